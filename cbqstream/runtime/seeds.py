"""Random generators that depend on (seed, window, purpose) alone, so that no random state has to be saved."""

import hashlib

import torch


def generator_for(seed: int, window: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose in one window."""
    digest = hashlib.sha256(f"{seed}|{window}|{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
