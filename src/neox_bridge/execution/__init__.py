"""Executes plans: the kernel copies unchanged bytes, numpy computes the others."""
