"""Differential privacy: what clients and records are promised, what it costs, what was spent."""
