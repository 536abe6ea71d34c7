"""Benchmarks, one module each: `python -m tests.bench NAME` runs the `main` of NAME."""
