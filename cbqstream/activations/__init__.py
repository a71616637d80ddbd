"""Activations at a boundary between blocks, one segment at a time. Only `zarr_store.py` knows how they lie on disk."""
