"""Proof: benchmarks, metrics, the runner, statistics and reports behind ``vlmeff eval``."""
