"""Changes of a block that make it easier to quantize."""
