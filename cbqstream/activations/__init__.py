"""Activations at a boundary between blocks, stored and read one segment at a time.

Their format on disk is defined in `zarr_store.py` alone.
"""
