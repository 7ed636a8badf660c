"""Measurements that results/benchmarks/ is filled from: `python -m benchmarks.NAME`."""
