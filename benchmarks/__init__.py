"""Measurements of the balanced step, and what compilers make of the GPU kernels.

`python -m benchmarks.run`, `python -m benchmarks.share`, `pytest benchmarks`; `python -m benchmarks.kernels`.
"""
