"""Adapters as matrices of low rank: combined, cut to a rank, compared, by their factors alone."""
