"""Evaluation of models that do not fit in memory, quantized or not, block by block."""
