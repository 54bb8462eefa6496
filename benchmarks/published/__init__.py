"""Prices of published runs: their plans, what they cost, and how far that is from what was measured."""
