"""What GPT-NeoX, DeepSpeed and transformers know, by version."""
