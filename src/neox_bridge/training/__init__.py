"""GPT-NeoX's training with Hugging Face models: what runs in its processes and beside them."""
