"""Checkpoints on disk: merge adapters into them, audit a merge, look into an adapter."""
