"""The Hugging Face Hub: what is taken from it and put there, through huggingface_hub."""
