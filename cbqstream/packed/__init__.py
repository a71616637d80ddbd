"""The quantized checkpoint in the format `pack-quantized` of compressed-tensors, one shard per finished block, and its exports."""
