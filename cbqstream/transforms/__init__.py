"""Transforms of a block that make it easier to quantize, one file each, and their registry."""
