"""Layers of the decoder and their decode caches."""
