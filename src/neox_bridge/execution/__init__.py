"""Writes what a plan says: bytes moved by the kernel where they stay, by numpy where they change."""
