"""Weights: safetensors files, read part by part and written whole."""
