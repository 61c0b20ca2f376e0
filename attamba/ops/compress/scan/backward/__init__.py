"""Gradients of the compressors where states pass between tiles."""
