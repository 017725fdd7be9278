"""The proof: bits, derived values and config compared; a torch reference of GPT-NeoX's forward."""
