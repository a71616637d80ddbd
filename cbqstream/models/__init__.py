"""Architectures: the tensors of a block, and the modules of transformers that run it. Only this package builds transformers modules."""
