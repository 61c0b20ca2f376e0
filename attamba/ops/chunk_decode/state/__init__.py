"""Kernels of a decode step beside its attention: recurrence, norms and gates."""
