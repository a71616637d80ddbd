"""Reading of checkpoints: contents are checked from headers alone, and tensors are read one at a time by name."""
