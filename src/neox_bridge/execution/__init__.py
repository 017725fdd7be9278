"""Writes what a plan says: the kernel moves bytes that stay, numpy makes those that change."""
