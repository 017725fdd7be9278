"""Access to files by local path or by URL of an object store."""
