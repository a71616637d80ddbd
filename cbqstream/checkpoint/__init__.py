"""Reading a checkpoint: what it holds is checked from headers alone, and tensors are read one at a time by name."""
