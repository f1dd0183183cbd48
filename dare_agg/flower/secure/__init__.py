"""Secure sums over Flower: the party's node, the session, the strategy."""
