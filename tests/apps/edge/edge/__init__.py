"""A federation whose clients learn known deltas."""
