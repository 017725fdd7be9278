"""Finds out what is wrong with a checkpoint, where it loads, and which command fixes it."""
