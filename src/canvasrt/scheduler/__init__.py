"""Continuous batching over canvases: which requests hold a slot, and what the runner does in each tick."""
