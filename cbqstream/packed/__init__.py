"""The quantized checkpoint in the formats of compressed-tensors, one shard per finished block, and its exports."""
