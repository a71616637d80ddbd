"""A trial of the code of a model before its weights are read: whether it can be run block by block.

A block is run alone, in batches, with the arguments that were recorded for one segment. This is right only if the model calls its blocks in
order, passes the output of each block unchanged to the next one, and gives them arguments that do not depend on the segment. The trial runs
the embedding, the head and one block of each kind on two short segments, with weights that take no memory. Headers are enough for it.
"""

import copy
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from cbqstream.errors import DeviceMemoryError, InputError, shown
from cbqstream.models.block import BlockArguments, build_block, run_block
from cbqstream.models.embedding_and_head import EmbeddingAndHead, Part, load_embedding_and_head
from cbqstream.models.families import EXPERT
from cbqstream.models.meta_model import MetaModel
from cbqstream.runtime.memory import is_out_of_memory

_TOKENS = 8
"""Length of the segments."""
_ROWS = 512
"""Number of rows of the embedding and the head that are used."""
_SIZE = 0.05
"""Standard deviation of the weights."""
_TOLERANCE = 1e-3
"""Allowed difference of hidden states that should be equal, as a share of the largest value."""
_DEPTH = 8
"""Depth to which arguments that are objects are compared."""
_NEVER_CALLED = "is never called as a layer"
_READ_DIRECTLY = "has a weight that the code of the block uses directly"
_CPU = torch.device("cpu")


def probe(meta_model: MetaModel) -> list[Mapping[str, str]]:
    """Check that a model can be run block by block.

    Args:
        meta_model: the model.

    Returns:
        For each block, the linear layers that cannot be quantized, by their name in the block, with the reason.

    Raises:
        InputError: the code of the model raises an exception, calls its blocks in another way, or gives them arguments that depend on the
            segment.
        DeviceMemoryError: there is not enough memory for one layer.
    """
    weights, rows = _Weights(meta_model), min(_ROWS, meta_model.vocab_size)
    ids_2S = torch.randint(rows, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # as in a run, one part is loaded without the other
        with _explained(meta_model, "embedding"), _loaded(meta_model, weights, "embedding") as outer:
            x_2SD = torch.stack([outer.embed(ids_S) for ids_S in ids_2S])
            _require_shape(meta_model, "the embedding", x_2SD)
            own_2SD = torch.stack([outer.embed(ids_S, own_positions=True) for ids_S in ids_2S])
            if not _near(x_2SD, own_2SD):
                raise not_streamable(meta_model, "the model counts positions in another way than from 0")
            arguments = _arguments(meta_model, outer, ids_2S)
        with _explained(meta_model, "head"), _loaded(meta_model, weights, "head") as outer:
            outer.head(x_2SD[0])
        kinds: dict[object, Mapping[str, str]] = {}
        found = []
        for index, block in enumerate(meta_model.templates):
            shapes = tuple((name, value.shape) for name, value in block.state_dict().items())
            kind = type(block), shapes, tuple(arguments[index].values)
            if kind not in kinds:
                with _explained(meta_model, _name_of(meta_model, index)):
                    kinds[kind] = _run_block(meta_model, weights, index, x_2SD, arguments[index])
            found.append(kinds[kind])
    return found


def _loaded(meta_model: MetaModel, weights: "_Weights", part: Part) -> AbstractContextManager[EmbeddingAndHead]:
    return load_embedding_and_head(meta_model, weights, device=_CPU, dtype=torch.float32, only=part)


class _Watched(nn.Linear):
    """A linear layer that records whether it is called, and whether other code than its own uses its weight.

    It computes with a weight of rank one, the product of the first column and the first row of its weight, which is much faster.
    """

    calls = 0
    reads = 0

    def forward(self, x: Tensor) -> Tensor:
        """The output [..., O] for inputs [..., I]."""
        self.calls += 1
        weight_OI, bias = self._parameters["weight"], self._parameters.get("bias")
        if weight_OI is None:
            raise RuntimeError("the layer has no weight")
        y = (x @ weight_OI[0]).unsqueeze(-1) * weight_OI[:, 0]
        return y if bias is None else y + bias

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.reads += 1
        return super().__getattr__(name)

    @classmethod
    def replacing(cls, linear: nn.Module) -> Self:
        """Make a linear layer record its use, in place."""
        linear.__class__ = type(f"Watched{type(linear).__name__}", (cls, type(linear)), {})
        return cast("Self", linear)


class _Weights:
    """Random weights of a model that take almost no memory: the value at [i, j, ...] depends only on i + j + ..."""

    def __init__(self, meta_model: MetaModel) -> None:
        self._shapes = {name: info.shape for name, info in meta_model.infos.items()}
        self._vocab_size = meta_model.vocab_size

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Random values in the shape of a tensor; zeros if the dtype has only integers. Embedding and head have at most 512 rows."""
        shape, dtype = list(self._shapes[name]), dtype or torch.float32
        if len(shape) == 2 and shape[0] == self._vocab_size:
            shape[0] = min(_ROWS, shape[0])
        if not dtype.is_floating_point or 0 in shape:
            return torch.zeros(1, dtype=dtype, device=device).expand(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = _SIZE * torch.randn(1 + sum(size - 1 for size in shape), generator=generator)
        if len(shape) == 1:
            values += 1  # norms scale by values near 1
        return values.to(device, dtype).as_strided(shape, [1] * len(shape))

    def input_quantizer(self, name: str) -> None:
        """Return None, because inputs are not quantized."""


def _arguments(meta_model: MetaModel, outer: EmbeddingAndHead, ids_2S: Tensor) -> list[BlockArguments]:
    """Keyword arguments of the blocks, after checks of how the model calls its blocks for two segments.

    Raises:
        InputError: the model calls its blocks in another way, or their arguments depend on the segment.
    """
    first, second = (outer.trace(ids_S) for ids_S in ids_2S)
    for calls in (first, second):
        order = [call.index for call in calls]
        if order != list(range(len(meta_model.blocks))):
            raise not_streamable(
                meta_model,
                f"the model does not call the blocks of {meta_model.blocks_path} once each, in order (it calls {order[:8]}...)",
            )
        for before, after in pairwise(calls):
            if before.output.shape != after.hidden_states.shape or not torch.equal(before.output, after.hidden_states):
                raise not_streamable(
                    meta_model,
                    f"{_name_of(meta_model, after.index)} does not receive the output of the block before it",
                )
    for one, other in zip(first, second, strict=True):
        require_same_arguments(meta_model, one.index, one.arguments, other.arguments)
    return [call.arguments for call in first]


def require_same_arguments(meta_model: MetaModel, index: int, one: BlockArguments, other: BlockArguments) -> None:
    """Check that the arguments of a block are the same for two segments.

    Args:
        meta_model: the model.
        index: number of the block.
        one: its arguments for a segment.
        other: its arguments for another segment.

    Raises:
        InputError: an argument differs.
    """
    for name in dict.fromkeys((*one.values, *other.values)):
        if not _equal(one.values.get(name), other.values.get(name)):
            raise not_streamable(
                meta_model,
                f'{_name_of(meta_model, index)} receives an argument "{name}" that depends on the tokens or on other blocks',
            )


def _run_block(
    meta_model: MetaModel, weights: _Weights, index: int, x_2SD: Tensor, arguments: BlockArguments
) -> Mapping[str, str]:
    """Run a block on two segments, together and alone.

    Returns:
        The linear layers that cannot be quantized, with the reason. A layer of an expert may rightly not be called.

    Raises:
        InputError: the outputs differ, have another shape, or the block changes its arguments.
    """
    name = _name_of(meta_model, index)
    block = build_block(meta_model, index, weights, device=_CPU, dtype=torch.float32, linear_dtype=torch.float32)
    watched = {layer: _Watched.replacing(block.get_submodule(layer)) for layer in meta_model.blocks[index].linears}
    before = copy.deepcopy(arguments.values)
    together_2SD = run_block(block, x_2SD, arguments)
    _require_shape(meta_model, name, together_2SD)
    alone_2SD = torch.cat([run_block(block, x_SD.unsqueeze(0), arguments) for x_SD in x_2SD])
    for argument, value in arguments.values.items():
        if not _equal(before[argument], value):
            raise not_streamable(meta_model, f'{name} changes its argument "{argument}", which other blocks may read')
    if not _near(together_2SD, alone_2SD):
        raise not_streamable(meta_model, f"{name} computes another output for a segment alone than for it in a batch")
    direct = {layer: _READ_DIRECTLY for layer, each in watched.items() if each.reads}
    return direct | {
        layer: _NEVER_CALLED for layer, each in watched.items() if not (each.calls or EXPERT.search(layer))
    }


def _require_shape(meta_model: MetaModel, what: str, x_2SD: Tensor) -> None:
    expected = [2, _TOKENS, meta_model.hidden_size]
    if list(x_2SD.shape) != expected:
        found = f"{what} returns hidden states of shape {list(x_2SD.shape)} for 2 segments of {_TOKENS} tokens"
        raise not_streamable(meta_model, f"{found}, and not {expected}")


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether hidden states are equal up to differences of float32 arithmetic; values that are not finite are not compared."""
    return not bool((one - other).abs().max() > _TOLERANCE * other.abs().max())


def _equal(one: Any, other: Any, depth: int = _DEPTH) -> bool:
    """Whether two values are equal, with all tensors in them. Objects are compared by their attributes."""
    if one is other or depth == 0:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(*pair, depth - 1) for pair in zip(one, other, strict=True))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key], depth - 1) for key in one)
    if hasattr(one, "__dict__"):
        return _equal(vars(one), vars(other), depth - 1)
    return bool(one == other)


def _name_of(meta_model: MetaModel, index: int) -> str:
    """Path and class of a block, for messages."""
    return f"{meta_model.blocks[index].prefix} ({type(meta_model.templates[index]).__name__})"


def not_streamable(meta_model: MetaModel, what: str) -> InputError:
    """The error for a model that cannot be run block by block."""
    kind = shown(str(meta_model.config.model_type))
    return InputError(
        meta_model.folder / "config.json",
        f'architecture "{kind}" cannot be run block by block here: {what}. Use another model.',
    )


@contextmanager
def _explained(meta_model: MetaModel, what: str) -> Iterator[None]:
    """Replace every exception of the code of the model, inside a `with`, by an error with one line."""
    try:
        yield
    except (InputError, DeviceMemoryError):
        raise
    except Exception as error:
        reason = shown(str(error).partition("\n")[0].rstrip(". "))
        if is_out_of_memory(error):
            raise DeviceMemoryError(f"{meta_model.folder}: not enough memory to try {what} ({reason}).") from error
        if "meta" in reason:
            held = f"{meta_model.blocks_path.rpartition('.')[0]} and the output embedding"
            raise not_streamable(meta_model, f"{what}: uses weights besides {held}, which are not loaded") from error
        raise not_streamable(meta_model, f"{what}: {type(error).__name__}: {reason}") from error
