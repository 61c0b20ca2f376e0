"""Benchmarks: `attamba bench decode` and `attamba bench train`."""
