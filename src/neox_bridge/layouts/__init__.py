"""Where each side keeps a model: files, ranks and eras of GPT-NeoX, shards of Hugging Face."""
