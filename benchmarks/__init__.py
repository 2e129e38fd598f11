"""Measurements of the balanced step: `python -m benchmarks.run`, `python -m benchmarks.share`, `pytest benchmarks`."""
