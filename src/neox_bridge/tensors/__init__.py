"""Where tensors lie, how they are cut, put together and shared among ranks, as plain data."""
