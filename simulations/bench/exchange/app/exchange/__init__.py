"""Sends a model of given shapes down and up, without training."""
