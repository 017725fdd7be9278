"""Access to the Hugging Face Hub, through huggingface_hub."""
