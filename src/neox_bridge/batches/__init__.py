"""Converts many checkpoints in one pool, and skips those that are already converted."""
