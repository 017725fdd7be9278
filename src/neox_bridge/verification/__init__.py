"""Verification: compares bits, derived values and config. Has a torch reference of GPT-NeoX."""
