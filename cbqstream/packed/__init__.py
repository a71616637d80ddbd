"""The quantized checkpoint: compressed-tensors `pack-quantized`, one shard per finished block."""
