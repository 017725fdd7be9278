"""What is wrong with a checkpoint, where it loads, and the command that fixes it."""
