"""Benchmarks: speed against torch's own ways, as ratios."""
