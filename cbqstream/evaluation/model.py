"""A model folder to run, and its hidden states after the last block, in bounded memory: every block is read once for all segments."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import ActivationStore, StreamShape
from cbqstream.activations.write_behind import write_behind
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import Disk
from cbqstream.errors import UsageError
from cbqstream.models.block import BlockArguments, build_block, run_block
from cbqstream.models.embedding_and_head import EmbeddingAndHead, End, load_embedding_and_head
from cbqstream.models.meta_model import MetaModel
from cbqstream.packed.format import schemes_of
from cbqstream.packed.packed_checkpoint import PackedSource
from cbqstream.records import Compute, WeightSource
from cbqstream.runtime.device import choose_device, compute_dtype, make_deterministic

Listener = Callable[[str], None]


class EvaluationOptions(TypedDict, total=False):
    """How a model is run."""

    batch_size: int
    """Segments at once; 4 by default."""
    scratch: Path | None
    """Folder for hidden states; the system's temporary folder by default."""
    device: str
    """auto (the default), cpu, cuda or cuda:N."""
    threads: int | None
    """CPU threads; the physical cores by default."""
    blocks_path: str | None
    """Module path of the list of transformer blocks; found by default."""
    listener: Listener
    """Told of progress."""


def open_model(folder: Path, blocks_path: str | None = None) -> tuple[MetaModel, WeightSource]:
    """What a model folder is, quantized by this project or not.

    Args:
        folder: where it is.
        blocks_path: module path of the list of transformer blocks; found by default.

    Raises:
        InputError: it cannot be read.
        UsageError: it is quantized in another form.
    """
    config = read_json(folder, "config.json")
    source: WeightSource = Checkpoint.open(folder)
    if isinstance(source, Checkpoint) and config.get("quantization_config"):
        source = PackedSource(source, schemes_of(config["quantization_config"]))
    return MetaModel(folder, config, source.tensors(), blocks_path), source


def require_counts(**counts: int | None) -> None:
    """Refuse numbers of something that are below one.

    Raises:
        UsageError: one is.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}. It must be at least 1.")


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model that is run block by block."""

    meta_model: MetaModel
    source: WeightSource
    compute: Compute
    """Hidden states are kept on disk in its dtype."""
    scratch: Path | None = None
    listener: Listener = lambda text: None

    @classmethod
    def open(cls, folder: Path, **how: Unpack[EvaluationOptions]) -> "EvaluatedModel":
        """The model of a folder.

        Raises:
            InputError: it cannot be read.
            UsageError: a number, folder or device that cannot work.
        """
        batch_size, scratch = how.get("batch_size", 4), how.get("scratch")
        require_counts(batch_size=batch_size)
        if scratch is not None and not scratch.is_dir():
            raise UsageError(f"{scratch}: no such folder.")
        device = choose_device(how.get("device", "auto"))
        make_deterministic(how.get("threads"))
        compute = Compute(device, compute_dtype(device), batch_size)
        return cls(
            *open_model(folder, how.get("blocks_path")), compute, scratch, how.get("listener", lambda text: None)
        )

    @contextmanager
    def hidden_states(self, groups: Sequence[Tensor]) -> Iterator[list[ActivationStore]]:
        """The outputs of the last block, a store for each group of segments; deleted afterwards.

        Args:
            groups: token ids int64 [N, S], of one length each; a causal model does not see what lies to the right of a token.
        """
        blocks = len(self.meta_model.blocks)
        with tempfile.TemporaryDirectory(prefix="cbqstream-eval-", dir=self.scratch) as work:
            self.listener("embedding")
            stores: list[ActivationStore] = []
            with self._outer("embed") as outer:
                arguments = [outer.block_arguments(tokens_NS[0]) for tokens_NS in groups]
                for number, tokens_NS in enumerate(groups):
                    shape = StreamShape(
                        len(tokens_NS), tokens_NS.shape[1], self.meta_model.hidden_size, self.compute.dtype
                    )
                    store = ZarrStore.create(Path(work) / f"stream-{number}", shape, Disk(), durable=False)
                    for segment, ids_S in enumerate(tokens_NS):
                        store.write(segment, outer.embed(ids_S))
                    stores.append(store)
            for index in range(blocks):
                self.listener(f"block {index + 1}/{blocks}")
                self._advance(index, [found[index] for found in arguments], stores)
            yield stores

    def head(self) -> AbstractContextManager[EmbeddingAndHead]:
        """The last norm and the head, for the length of a `with`."""
        self.listener("head")
        return self._outer("head")

    def _outer(self, only: End) -> AbstractContextManager[EmbeddingAndHead]:
        return load_embedding_and_head(
            self.meta_model, self.source, device=self.compute.device, dtype=self.compute.dtype, only=only
        )

    @torch.no_grad()
    def _advance(self, index: int, arguments: Sequence[BlockArguments], stores: Sequence[ActivationStore]) -> None:
        """Replace every segment by what block `index` makes of it."""
        device, dtype = self.compute.device, self.compute.dtype
        block = build_block(self.meta_model, index, self.source, device=device, dtype=dtype, linear_dtype=dtype)
        for store, called in zip(stores, arguments, strict=True):
            batches = in_batches(range(store.shape.num_segments), self.compute.batch_size)
            with write_behind(store) as write:
                for batch, (x_BSD,) in zip(batches, read_batches([store], batches, device), strict=True):
                    y_BSD = run_block(block, x_BSD, called)
                    for segment, y_SD in zip(batch, y_BSD, strict=True):
                        write(segment, y_SD)
