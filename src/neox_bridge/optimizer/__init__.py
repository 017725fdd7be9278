"""The optimizer of a GPT-NeoX run."""
