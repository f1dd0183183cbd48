"""Merge methods as rows of one table, and the tiled engine that runs them."""
