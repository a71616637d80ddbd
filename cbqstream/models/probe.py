"""A trial of the code of a model before its weights are read: whether it can be run block by block.

A block is run alone, in batches, with the arguments that were recorded without the other blocks. This is right only if the model calls its
blocks in order, passes the output of each block unchanged to the next one, and gives them arguments that do not depend on other blocks. The
trial runs the embedding, the head and one block of each kind on two short segments, with weights that take no memory. Headers are enough
for it.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cbqstream.errors import DeviceMemoryError, InputError, shown
from cbqstream.models.block import STATE, BlockArguments, advance, build_block, handed_values
from cbqstream.models.differences import name_of, near, not_streamable, same
from cbqstream.models.embedding_and_head import EmbeddingAndHead, Part, load_embedding_and_head
from cbqstream.models.families import EXPERT, joined_with
from cbqstream.models.handover import Handover
from cbqstream.models.meta_model import MetaModel
from cbqstream.models.trial_weights import ROWS, TrialWeights, WatchedLinear
from cbqstream.runtime.memory import is_out_of_memory

_TOKENS = 8
"""Length of the segments."""
_OWN_CODE = "is computed by code of its own"
NEVER_CALLED = "is never called as a layer"
_READ_DIRECTLY = "has a weight that the code of the block uses directly"
_FEWEST_COLUMNS = 16
"""Number of columns below which no inference engine computes a quantized layer."""
_NARROW = f"has fewer than {_FEWEST_COLUMNS} columns"
_JOINED = "is computed by inference engines as one layer with such a layer"
_CPU = torch.device("cpu")


def probe(meta_model: MetaModel) -> None:
    """Check that a model can be run block by block.

    The trial finds what the blocks hand each other (`MetaModel.handover`), and the layers that cannot be quantized, which are left out.

    Args:
        meta_model: the model.

    Raises:
        InputError: the code of the model raises an exception, calls its blocks in another way, or gives them arguments that depend on
            other blocks.
        DeviceMemoryError: there is not enough memory for one layer.
    """
    meta_model.handover = Handover(meta_model.hidden_size)
    weights, rows = TrialWeights(meta_model), min(ROWS, meta_model.vocab_size)
    ids_2S = torch.randint(rows, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # as in a run, one part is loaded without the other
        with _explained(meta_model, "embedding"), _loaded(meta_model, weights, "embedding") as outer:
            counts_positions = outer.learn_who_counts_positions()
            arguments = _arguments(meta_model, outer, ids_2S)
            entered = [outer.enter(ids_S, arguments) for ids_S in ids_2S]
        x_2SD = torch.stack([x_SD for x_SD, _ in entered])
        beside: Mapping[str, Tensor] = {
            key: torch.stack([values[key] for _, values in entered]) for key in entered[0][1]
        }
        _require_shape(meta_model, "the embedding", x_2SD, x_2SD.shape[2])
        with _explained(meta_model, "head"), _loaded(meta_model, weights, "head") as outer:
            if not outer.head(x_2SD[0]).any():
                raise not_streamable(meta_model, "the head uses weights of the embedding")
            if not outer.head_reads_only_the_last_block(x_2SD[0]):
                raise not_streamable(meta_model, "the head depends on the embedding or on other blocks than the last")
        kinds: dict[object, _Found] = {}
        found = list[_Found]()
        for index, block in enumerate(meta_model.templates):
            shapes = tuple((name, value.shape) for name, value in block.state_dict().items())
            called = arguments[index]
            kind = type(block), shapes, tuple(called.values), tuple(called.of_tokens)
            if kind not in kinds or called.hands_on:  # blocks of one kind may hand on other values
                with _explained(meta_model, name_of(meta_model, index)):
                    kinds[kind] = _run_block(meta_model, weights, index, x_2SD, called, beside)
            found.append(kinds[kind])
            beside = kinds[kind].beside
    kept, growth = _kept(found), 0.0
    handed_bytes = max(sum(_bytes(each.beside[key]) for key in keys) for each, keys in zip(found, kept, strict=True))
    if handed_bytes:
        twice = _handed_bytes(meta_model, weights, ids_2S.flatten(), kept)
        growth = math.log2(twice / handed_bytes)
    meta_model.handover = Handover(
        width=x_2SD.shape[2],
        repeated=tuple(dict.fromkeys(name for each in found for name in each.repeated)),
        token_bytes=sum(value[0].numel() * value.itemsize for key, value in beside.items() if not key.startswith(STATE))
        // _TOKENS,
        counts_positions=counts_positions,
        kept=kept if any(kept) else (),
        handed_bytes=handed_bytes / _TOKENS**growth,
        handed_growth=growth,
    )
    meta_model.leave_out([each.not_quantizable for each in found])


def _loaded(meta_model: MetaModel, weights: TrialWeights, part: Part) -> AbstractContextManager[EmbeddingAndHead]:
    return load_embedding_and_head(meta_model, weights, device=_CPU, dtype=torch.float32, only=part)


def _arguments(meta_model: MetaModel, outer: EmbeddingAndHead, ids_2S: Tensor) -> list[BlockArguments]:
    """Keyword arguments of the blocks, after checks of how the model calls its blocks for two segments.

    Raises:
        InputError: the model calls its blocks in another way, or their arguments depend on other blocks.
    """
    traced = [outer.trace(ids_S, seed) for seed, ids_S in enumerate((*ids_2S, ids_2S[0]))]
    for calls in traced:
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
                    f"{name_of(meta_model, after.index)} does not receive the output of the block before it",
                )
    first, second, again = traced
    for one, other in zip(first, again, strict=True):
        require_same_arguments(meta_model, one.index, one.arguments, other.arguments, "other blocks")
    arguments = outer.block_arguments(ids_2S[0])
    for called, call in zip(arguments, second, strict=True):
        others = {name: value for name, value in call.arguments.items() if name not in called.of_tokens}
        require_same_arguments(meta_model, call.index, called.values, others)
    return arguments


def require_same_arguments(
    meta_model: MetaModel, index: int, one: Mapping[str, Any], other: Mapping[str, Any], on: str = "the tokens"
) -> None:
    """Check that the arguments of a block are the same in two calls.

    Args:
        meta_model: the model.
        index: number of the block.
        one: its arguments in a call, by name.
        other: its arguments in another call, by name.
        on: what the arguments depend on if they differ.

    Raises:
        InputError: an argument differs.
    """
    for name in dict.fromkeys((*one, *other)):
        if not same(one.get(name), other.get(name)):
            raise not_streamable(
                meta_model,
                f'{name_of(meta_model, index)} receives an argument "{name}" that depends on {on}',
            )


@dataclass(frozen=True, slots=True)
class _Found:
    """Facts about a block that a trial found."""

    not_quantizable: dict[str, str]
    """Linear layers that cannot be quantized, with the reason. A layer of an expert may rightly not be called."""
    repeated: tuple[str, ...]
    """Arguments that the block wants with the number of segments as the first dimension."""
    beside: Mapping[str, Tensor]
    """Values beside the hidden states after the block, by key."""
    reads: Collection[str]
    """Keys of the values from other blocks that the block reads."""
    passes: Collection[str]
    """Keys of the values from other blocks that the block hands on as they are."""


def _run_block(
    meta_model: MetaModel,
    weights: TrialWeights,
    index: int,
    x_2SD: Tensor,
    arguments: BlockArguments,
    beside: Mapping[str, Tensor],
) -> _Found:
    """Run a block on two segments, together and alone.

    Raises:
        InputError: the outputs differ, have another shape, or the block changes its arguments.
    """
    name = name_of(meta_model, index)
    block = build_block(meta_model, index, weights, device=_CPU, dtype=torch.float32, linear_dtype=torch.float32)
    plain = {
        layer: _is_plain(meta_model.templates[index].get_submodule(layer)) for layer in meta_model.blocks[index].linears
    }
    watched = {
        layer: WatchedLinear.replacing(block.get_submodule(layer)) for layer, is_plain in plain.items() if is_plain
    }
    before, handed = copy.deepcopy(arguments.values), handed_values(beside)
    repeated: tuple[str, ...] = ()
    with _Uses(handed) as reading:
        try:
            together_2SD, after = advance(block, x_2SD, arguments, beside=beside)
        except (ValueError, RuntimeError, IndexError):
            repeated = tuple(key for key, value in arguments.values.items() if _is_of_one_segment(value))
            if not repeated:
                raise
            arguments = replace(arguments, by_segment=(*arguments.by_segment, *repeated))
            together_2SD, after = advance(block, x_2SD, arguments, beside=beside)
    _require_shape(meta_model, name, together_2SD, x_2SD.shape[2])
    alone = [
        advance(
            block, x_SD.unsqueeze(0), arguments, beside={key: value[row : row + 1] for key, value in beside.items()}
        )
        for row, x_SD in enumerate(x_2SD)
    ]
    for argument, value in arguments.values.items():
        if not same(before[argument], value):
            raise not_streamable(meta_model, f'{name} changes its argument "{argument}", which other blocks may read')
    one_by_one = torch.cat([x_1SD for x_1SD, _ in alone])
    for key, value in handed_values(after).items():
        if value.shape[:1] != (2,) or not near(value.float(), torch.cat([values[key] for _, values in alone]).float()):
            raise not_streamable(
                meta_model, f'{name} hands on "{key[1:]}", which is another one for a segment alone than in a batch'
            )
    if not near(together_2SD, one_by_one):
        raise not_streamable(meta_model, f"{name} computes another output for a segment alone than for it in a batch")
    direct = {layer: _READ_DIRECTLY for layer, each in watched.items() if each.reads}
    # an expert may rightly not be called for a short text, but not all experts
    mixture = {layer: joined_with(layer) if EXPERT.search(layer) else layer for layer in watched}
    called = {mixture[layer] for layer, each in watched.items() if each.calls}
    never = {layer: NEVER_CALLED for layer in watched if mixture[layer] not in called}
    own = {layer: _OWN_CODE for layer, is_plain in plain.items() if not is_plain}
    spec = meta_model.blocks[index]
    columns = {layer: meta_model.infos[spec.tensors[f"{layer}.weight"]].shape[1] for layer in spec.linears}
    narrow = {layer: _NARROW for layer, count in columns.items() if count < _FEWEST_COLUMNS}
    unfit = direct | never | own | narrow
    joined = {joined_with(layer) for layer in unfit}
    unfit |= {layer: _JOINED for layer in spec.linears if layer not in unfit and joined_with(layer) in joined}
    passes = {key for key in handed if after.get(key) is beside[key]}
    return _Found(unfit, repeated, after, reading.used, passes)


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which tensors operations read, inside a `with`.

    Whether the results change without a tensor would not tell: a router may choose the same experts by chance.

    Args:
        tensors: the tensors by key.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys = {value.untyped_storage().data_ptr(): key for key, value in tensors.items()}
        self.used: set[str] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                key = self._keys.get(value.untyped_storage().data_ptr())
                self.used.update(() if key is None else (key,))
        return func(*args, **(kwargs or {}))


def _bytes(value: Tensor) -> int:
    """Size of the tensor of one segment in a batch."""
    return value[0].numel() * value.itemsize


def _handed_bytes(meta_model: MetaModel, weights: TrialWeights, ids_S: Tensor, kept: Sequence[Collection[str]]) -> int:
    """Largest size of the values that a block hands on to later ones, in bytes for a segment.

    Args:
        meta_model: the model.
        weights: weights of the model.
        ids_S: token ids of the segment.
        kept: keys of the values that each block hands on.
    """
    with _loaded(meta_model, weights, "embedding") as outer:
        arguments = outer.block_arguments(ids_S)
        x_SD, values = outer.enter(ids_S, arguments)
    x_1SD, sizes = x_SD.unsqueeze(0), []
    beside: Mapping[str, Tensor] = {key: value.unsqueeze(0) for key, value in values.items()}
    for index, (called, keys) in enumerate(zip(arguments, kept, strict=True)):
        block = build_block(meta_model, index, weights, device=_CPU, dtype=torch.float32, linear_dtype=torch.float32)
        for layer in meta_model.blocks[index].linears:
            if _is_plain(block.get_submodule(layer)):
                WatchedLinear.replacing(block.get_submodule(layer))
        _, beside = advance(block, x_1SD, called, beside=beside)
        sizes.append(sum(_bytes(beside[key]) for key in keys))
    return max(sizes)


def _kept(found: Sequence[_Found]) -> tuple[frozenset[str], ...]:
    """Keys of the values after each block that a later block reads."""
    kept, live = [], set[str]()
    for each in reversed(found):
        kept.append(frozenset(live))
        live = {*each.reads, *live.intersection(each.passes)}
    return tuple(reversed(kept))


def _is_of_one_segment(argument: Any) -> bool:
    """Whether an argument is a tensor, or a tuple of tensors, whose first dimension is 1."""
    tensors = argument if isinstance(argument, tuple) else (argument,)
    return bool(tensors) and all(isinstance(value, Tensor) and value.shape[:1] == (1,) for value in tensors)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer computes what `nn.Linear` does; code of another class is tried with a small weight."""
    if type(linear).forward is nn.Linear.forward:
        return True
    generator, small = torch.Generator().manual_seed(0), copy.copy(linear)
    weight_OI, x = (torch.randn(rows, _TOKENS, generator=generator) for rows in (_TOKENS, 3))
    small._parameters = {"weight": nn.Parameter(weight_OI), "bias": None}
    try:
        return near(small(x), x @ weight_OI.T)
    except Exception:  # noqa: BLE001  # the code needs another shape
        return False


def _require_shape(meta_model: MetaModel, what: str, x_2SD: Tensor, width: int) -> None:
    expected = [2, _TOKENS, width]
    if list(x_2SD.shape) != expected:
        found = f"{what} returns hidden states of shape {list(x_2SD.shape)} for 2 segments of {_TOKENS} tokens"
        raise not_streamable(meta_model, f"{found}, and not {expected}")


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
            raise not_streamable(meta_model, f"{what}: uses weights that do not belong to the text model") from error
        raise not_streamable(meta_model, f"{what}: {type(error).__name__}: {reason}") from error
