"""The loop that computes a stream from other streams: read a batch of segments, compute, write the results."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import ActivationStore
from cbqstream.activations.write_behind import write_behind


def map_segments(
    sources: Sequence[ActivationStore],
    destination: ActivationStore,
    batch_size: int,
    device: torch.device,
    compute: Callable[..., Tensor],
) -> None:
    """Apply `compute` to all segments and store the results; reading and writing overlap with computing.

    Args:
        sources: stores with the same number of segments.
        destination: store of the results; it may be one of the sources.
        batch_size: segments in a batch.
        device: device on which batches are placed.
        compute: called with one tensor [B, S, D] per source, in the dtype of that store; returns [B, S, D].

    Raises:
        InputError: a segment cannot be read.
        StorageError: a segment cannot be written.
    """
    batches = in_batches(range(sources[0].shape.num_segments), batch_size)
    with write_behind(destination) as write:
        for batch, read in zip(batches, read_batches(sources, batches, device), strict=True):
            for segment, y_SD in zip(batch, compute(*read), strict=True):
                write(segment, y_SD)
