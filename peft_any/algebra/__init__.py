"""Adapters as matrices of low rank: summed, cut to a rank, compared, by their factors alone."""
