"""Measuring a model that never fits in memory, quantized or not, block by block."""
