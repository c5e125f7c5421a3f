"""Benchmarks: each prints its table, none asserts a time."""
