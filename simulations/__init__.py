"""Scenarios, sweeps, benchmarks and plots: the evidence, each figure from one command."""
