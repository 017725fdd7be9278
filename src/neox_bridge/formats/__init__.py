"""Bytes on disk: safetensors, torch's ``.pt`` files, pickles read without running them, yml."""
