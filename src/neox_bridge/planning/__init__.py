"""Plans every byte of an output from an opened source. Pure functions without I/O."""
