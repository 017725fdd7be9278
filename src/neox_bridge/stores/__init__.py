"""Where files are: a local path, or the URL of an object in a store that fsspec knows."""
