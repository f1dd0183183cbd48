"""Parties in groups: each learns what its name says, and one of them lies."""
