"""Shardwise: the split of a PyTorch model and its data over machines, found, run and proved."""
