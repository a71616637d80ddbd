"""Stores of the values beside the hidden states: the arguments of blocks that depend on the tokens of a segment."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from cbqstream.activations.store import ActivationStore, StoredValue, StreamShape, as_matrix
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.disk import Disk
from cbqstream.models.block import BlockArguments
from cbqstream.models.embedding_and_head import EmbeddingAndHead


def create_beside(
    folder: Path, arguments: Sequence[BlockArguments], num_segments: int, disk: Disk
) -> dict[str, StoredValue]:
    """Create an empty store for each value, by its key. They are not durable.

    Args:
        folder: folder of the stores, which is made if there is a value.
        arguments: arguments of all blocks.
        num_segments: number of segments.
        disk: writes the files.
    """
    values = {value.key: value for called in arguments for value in called.of_tokens.values()}
    if values:
        disk.make_folder(folder)
    return {
        key: StoredValue(
            ZarrStore.create(
                folder / key, StreamShape(num_segments, *as_matrix(value.shape), value.dtype), disk, durable=False
            ),
            value.shape,
        )
        for key, value in values.items()
    }


def write_segments(
    outer: EmbeddingAndHead,
    arguments: Sequence[BlockArguments],
    tokens_NS: Tensor,
    stream: ActivationStore | None,
    beside: Mapping[str, StoredValue],
) -> None:
    """Embed all segments, and store the hidden states and the values beside them.

    Args:
        outer: the embedding of the model.
        arguments: arguments of all blocks for segments of this length.
        tokens_NS: token ids, int64 [N, S].
        stream: store of the hidden states; None if only the values are stored.
        beside: store of each value, by its key.

    Raises:
        StorageError: a segment cannot be written.
    """
    for segment, ids_S in enumerate(tokens_NS):
        x_SD, values = outer.enter(ids_S, arguments)
        if stream is not None:
            stream.write(segment, x_SD)
        for key, value in values.items():
            beside[key].store.write(segment, value.reshape(as_matrix(value.shape)))
