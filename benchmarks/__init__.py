"""Benchmarks: every figure is a ratio to native ext4 on the same data. ``./run bench --help``."""
