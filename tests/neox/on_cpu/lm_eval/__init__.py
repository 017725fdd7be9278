"""Stands for lm-evaluation-harness: what eval_tasks/eval_adapter.py of GPT-NeoX takes from it.

Its one task scores fixed continuations, with the adapter of GPT-NeoX.
"""
