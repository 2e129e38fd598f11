"""Measurements of the balanced step, and what compilers make of the GPU kernels.

`python -m benchmarks.run`, `python -m benchmarks.sources`; `python -m benchmarks.kernels`.
"""
