"""Experiments: what a scenario's rows run, and what they are made of."""
