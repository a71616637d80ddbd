"""The loop that computes a stream from other streams: read a batch of segments, compute, write the results."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import ActivationStore, as_matrix
from cbqstream.activations.write_behind import write_behind


def map_segments(
    sources: Sequence[ActivationStore],
    destination: ActivationStore,
    batch_size: int,
    device: torch.device,
    compute: Callable[..., Tensor | tuple[Tensor, Mapping[str, Tensor]]],
) -> None:
    """Apply `compute` to all segments and store the results; reading and writing overlap with computing.

    Args:
        sources: stores with the same number of segments.
        destination: store of the results; it may be one of the sources.
        batch_size: segments in a batch.
        device: device on which batches are placed.
        compute: called with one tensor [B, S, D] per source, in the dtype of that store; returns [B, S, D], and values that are handed
            on with them, [B, ...] by key.

    Raises:
        InputError: a segment cannot be read.
        StorageError: a segment cannot be written.
    """
    batches = in_batches(range(sources[0].shape.num_segments), batch_size)
    with ExitStack() as open_stores:
        write = open_stores.enter_context(write_behind(destination))
        write_value: dict[str, Callable[[int, Tensor], None]] = {}
        for batch, read in zip(batches, read_batches(sources, batches, device), strict=True):
            result = compute(*read)
            y_BSD, handed = (result, {}) if isinstance(result, Tensor) else result
            for key, value in handed.items():
                if key not in write_value:
                    store = destination.hand_on(key, value.shape[1:], value.dtype).store
                    write_value[key] = open_stores.enter_context(write_behind(store))
            for row, segment in enumerate(batch):
                write(segment, y_BSD[row])
                for key, value in handed.items():
                    write_value[key](segment, value[row].reshape(as_matrix(value.shape[1:])))
    destination.handed = {key: destination.handed[key] for key in write_value}
