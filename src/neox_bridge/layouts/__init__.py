"""Where each side keeps a model: files, ranks, names and eras of GPT-NeoX, shards of Hugging Face."""
