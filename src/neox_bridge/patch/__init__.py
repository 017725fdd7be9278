"""The patcher of GPT-NeoX source trees."""
