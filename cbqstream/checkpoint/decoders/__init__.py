"""Decoders of quantized weights, one file for each way in which they are stored."""
