"""Metrics: fixed-size sums a rank, added over ranks."""
