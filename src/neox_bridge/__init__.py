"""Moves language-model checkpoints between Hugging Face and GPT-NeoX, without either framework."""

__version__ = "0.1.0"
