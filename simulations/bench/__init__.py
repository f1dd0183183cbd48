"""Benchmarks, one a file: ``python -m simulations.bench.NAME``."""
