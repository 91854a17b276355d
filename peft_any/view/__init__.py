"""A bound model's weights, as arrays that a forward function uses unchanged."""
