"""Whether balancing helps on real images: the same student trained in every way, each with its own learning rate.

`python -m benchmarks.evidence` trains and writes a row per run; docs/evidence.md says how, and what came out.
"""
