"""Prices of published runs: their plans, what they cost, and how far that is from what was measured."""

from benchmarks.published.rows import Shape, Tokens, job

__all__ = ["Shape", "Tokens", "job"]
