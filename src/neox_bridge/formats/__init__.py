"""File formats: safetensors, PyTorch files, pickles that are read but never run, yml, JSON."""
