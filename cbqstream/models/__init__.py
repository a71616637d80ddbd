"""Architectures: which tensors make a block, and how transformers runs it. Only this folder builds transformers modules."""
