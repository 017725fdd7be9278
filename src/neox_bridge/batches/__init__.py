"""Many checkpoints at once: which there are, what is done already, all converted by one pool."""
