"""Starts training on many GPUs: jobs of SLURM through submitit, or torchrun on this machine."""
