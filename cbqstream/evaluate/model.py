"""A model folder to run, and its hidden states after the last block, in bounded memory: every block is read once for all segments."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import ActivationStore, StreamShape
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import Disk
from cbqstream.errors import UsageError
from cbqstream.models.block import BlockArguments, build_block, run_block
from cbqstream.models.ends import model_ends
from cbqstream.models.skeleton import ModelSkeleton
from cbqstream.packed.format import schemes_of
from cbqstream.packed.source import PackedSource
from cbqstream.records import Compute, WeightSource

Listener = Callable[[str], None]


def open_model(folder: Path, blocks_path: str | None = None) -> tuple[ModelSkeleton, WeightSource]:
    """A model folder to run, quantized by this project or not.

    Args:
        folder: where it is.
        blocks_path: module path of the list of transformer blocks; found by default.

    Raises:
        InputError: it cannot be read.
        UsageError: it is quantized in another form.
    """
    config = read_json(folder, "config.json")
    source: WeightSource = Checkpoint.open(folder)
    if config.get("quantization_config"):
        source = PackedSource(Checkpoint.open(folder), schemes_of(config["quantization_config"]))
    return ModelSkeleton(folder, config, source.tensors(), blocks_path), source


def require_counts(**counts: int | None) -> None:
    """Refuse numbers of something that are below one.

    Raises:
        UsageError: one is.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}. It must be at least 1.")


def require_folder(scratch: Path | None) -> None:
    """Refuse a folder that is not there.

    Raises:
        UsageError: it is not.
    """
    if scratch is not None and not scratch.is_dir():
        raise UsageError(f"{scratch}: no such folder.")


@contextmanager
def hidden_states(
    skeleton: ModelSkeleton,
    source: WeightSource,
    groups: Sequence[Tensor],
    compute: Compute,
    *,
    scratch: Path | None = None,
    listener: Listener = lambda text: None,
) -> Iterator[list[ActivationStore]]:
    """The outputs of the last block, a store for each group of segments; deleted afterwards.

    Args:
        skeleton: the model.
        source: its weights.
        groups: token ids int64 [N, S], of one length each; a causal model does not see what lies to the right of a token.
        compute: where and how; hidden states are kept on disk in its dtype.
        scratch: folder for them; the system's temporary folder by default.
        listener: told of progress.
    """
    with tempfile.TemporaryDirectory(prefix="cbqstream-eval-", dir=scratch) as work:
        listener("embedding")
        stores: list[ActivationStore] = []
        with model_ends(skeleton, source, device=compute.device, dtype=compute.dtype, only="embed") as ends:
            arguments = [ends.block_arguments(tokens_NS[0]) for tokens_NS in groups]
            for number, tokens_NS in enumerate(groups):
                shape = StreamShape(len(tokens_NS), tokens_NS.shape[1], skeleton.hidden_size, compute.dtype)
                store = ZarrStore.create(Path(work) / f"stream-{number}", shape, Disk(), durable=False)
                for segment, ids_S in enumerate(tokens_NS):
                    store.write(segment, ends.embed(ids_S))
                stores.append(store)
        for index in range(len(skeleton.blocks)):
            listener(f"block {index + 1}/{len(skeleton.blocks)}")
            _advance(skeleton, source, index, [found[index] for found in arguments], stores, compute)
        yield stores


@torch.no_grad()
def _advance(
    skeleton: ModelSkeleton,
    source: WeightSource,
    index: int,
    arguments: Sequence[BlockArguments],
    stores: Sequence[ActivationStore],
    compute: Compute,
) -> None:
    """Replace every segment by what block `index` makes of it."""
    block = build_block(skeleton, index, source, device=compute.device, dtype=compute.dtype, linear_dtype=compute.dtype)
    for store, called in zip(stores, arguments, strict=True):
        batches = in_batches(range(store.shape.num_segments), compute.batch_size)
        for batch, (x_BSD,) in zip(batches, read_batches([store], batches), strict=True):
            y_BSD = run_block(block, x_BSD.to(compute.device), called)
            for segment, y_SD in zip(batch, y_BSD, strict=True):
                store.write(segment, y_SD)
