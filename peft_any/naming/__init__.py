"""Module names: the rules of `--map`, renamed adapters, fused layers and their parts."""
