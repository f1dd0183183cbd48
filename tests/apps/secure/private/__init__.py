"""Parties who merge models they already have."""
