"""A model folder to evaluate, and its hidden states after the last block, in bounded memory: every block is read once for all segments."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from cbqstream.activations.map_segments import map_segments
from cbqstream.activations.store import ActivationStore, StoredValue, StreamShape
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.tensors import OpenedSource, WeightSource
from cbqstream.disk import Disk
from cbqstream.errors import UsageError
from cbqstream.models.beside import create_beside, write_segments
from cbqstream.models.block import BlockArguments, build_block, handed_values
from cbqstream.models.embedding_and_head import EmbeddingAndHead, Part, load_embedding_and_head
from cbqstream.models.meta_model import MetaModel
from cbqstream.models.probe import probe
from cbqstream.packed.sources import open_source
from cbqstream.records import Compute
from cbqstream.runtime.device import choose_device, compute_dtype, fixed_numerics
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.resident_block import ResidentBlock, advance_blocks, as_batch, values_beside

Listener = Callable[[str], None]
"""Called with what is being done."""


class EvaluationOptions(TypedDict, total=False):
    """Options with which a model is run."""

    batch_size: int
    """Segments in a batch; 4 by default."""
    scratch: Path | None
    """Folder for hidden states; the system's temporary folder by default."""
    device: str
    """auto (the default), cpu, cuda or cuda:N."""
    threads: int | None
    """CPU threads; the physical cores by default."""
    blocks_path: str | None
    """Module path of the list of transformer blocks; found by default."""
    allow_links: bool
    """Read shards that are links to files outside the model folder; False by default."""
    listener: Listener
    """Called with what is being done."""


def open_model(
    folder: Path, blocks_path: str | None = None, *, allow_links: bool = False
) -> tuple[MetaModel, OpenedSource]:
    """The model in a folder, quantized or not.

    Args:
        folder: folder of the model.
        blocks_path: module path of the list of transformer blocks; found by default.
        allow_links: read shards that are links to files outside the folder.

    Raises:
        InputError: the model cannot be read, is quantized in a way that is not read, or cannot be run block by block.
    """
    config = read_json(folder, "config.json")
    source = open_source(folder, config, allow_links=allow_links)
    meta_model = MetaModel(folder, config, source.infos, blocks_path)
    probe(meta_model)
    return meta_model, source.viewed(meta_model.infos)


def require_counts(**counts: int | None) -> None:
    """Refuse numbers below one.

    Raises:
        UsageError: a number is below one.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}. It must be at least 1.")


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model that is run block by block. The global state of torch is only changed inside `hidden_states` and `head`."""

    meta_model: MetaModel
    source: WeightSource
    compute: Compute
    """Hidden states are stored in its dtype."""
    threads: int | None = None
    scratch: Path | None = None
    listener: Listener = lambda text: None

    @classmethod
    def open(cls, folder: Path, **options: Unpack[EvaluationOptions]) -> "EvaluatedModel":
        """The model in a folder.

        Raises:
            InputError: the model cannot be read.
            UsageError: a number, folder or device cannot work.
        """
        batch_size, scratch = options.get("batch_size", 4), options.get("scratch")
        require_counts(batch_size=batch_size)
        if scratch is not None and not scratch.is_dir():
            raise UsageError(f"{scratch}: no such folder.")
        device = choose_device(options.get("device", "auto"))
        return cls(
            *open_model(folder, options.get("blocks_path"), allow_links=options.get("allow_links", False)),
            Compute(device, compute_dtype(device), batch_size),
            options.get("threads"),
            scratch,
            options.get("listener", lambda text: None),
        )

    @contextmanager
    def hidden_states(self, groups: Sequence[Tensor]) -> Iterator[list[ActivationStore]]:
        """Outputs of the last block, one store per group of segments; deleted at the end of the `with`.

        Args:
            groups: token ids int64 [N, S], of one length in each group; tokens to the right of a token do not change its output.
        """
        blocks = len(self.meta_model.blocks)
        with (
            fixed_numerics(self.compute.device, self.threads),
            tempfile.TemporaryDirectory(prefix="cbqstream-eval-", dir=self.scratch) as work,
        ):
            self.listener("embedding")
            stores: list[ActivationStore] = []
            with self._loaded("embedding") as outer:
                arguments = [outer.block_arguments(tokens_NS[0]) for tokens_NS in groups]
                for number, tokens_NS in enumerate(groups):
                    num, length = tokens_NS.shape
                    shape = StreamShape(num, length, self.meta_model.hidden_size, self.compute.dtype)
                    path = Path(work) / f"stream-{number}"
                    store = ZarrStore.create(path, shape, Disk(), durable=False)
                    beside = create_beside(path.with_suffix(".beside"), arguments[number], num, Disk())
                    write_segments(outer, arguments[number], tokens_NS, store, beside)
                    store.beside = beside
                    stores.append(store)
            for index in range(blocks):
                self.listener(f"block {index + 1}/{blocks}")
                self._advance(index, [found[index] for found in arguments], stores)
            yield stores

    @contextmanager
    def head(self) -> Iterator[EmbeddingAndHead]:
        """The final norm and the head in memory, inside a `with`."""
        self.listener("head")
        with fixed_numerics(self.compute.device, self.threads), self._loaded("head") as outer:
            yield outer

    @contextmanager
    def _loaded(self, only: Part) -> Iterator[EmbeddingAndHead]:
        device, dtype = self.compute.device, self.compute.dtype
        with load_embedding_and_head(self.meta_model, self.source, device=device, dtype=dtype, only=only) as outer:
            yield outer

    @torch.no_grad()
    def _advance(self, index: int, arguments: Sequence[BlockArguments], stores: Sequence[ActivationStore]) -> None:
        """Replace every segment by the output of block `index`."""
        device, dtype = self.compute.device, self.compute.dtype
        block = build_block(self.meta_model, index, self.source, device=device, dtype=dtype, linear_dtype=dtype)
        for store, called in zip(stores, arguments, strict=True):
            blocks = [ResidentBlock(index, block, called)]
            beside = values_beside(blocks, store)

            def run(
                x_BSD: Tensor,
                *values: Tensor,
                blocks: Sequence[ResidentBlock] = blocks,
                beside: Mapping[str, StoredValue] = beside,
            ) -> tuple[Tensor, Mapping[str, Tensor]]:
                y_BSD, after = advance_blocks(blocks, x_BSD, Phase.ORIGINAL, as_batch(beside, values))
                return y_BSD, handed_values(after)

            sources = [store, *(value.store for value in beside.values())]
            map_segments(sources, store, self.compute.batch_size, device, run)
