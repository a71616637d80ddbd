"""One transformer block with its weights: building and running it."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.models.meta_model import MetaModel
from cbqstream.numerics.slabs import in_slabs, linear_in_slabs

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""No values beside the hidden states."""
STATE = "+"
"""First character of the key of a value that blocks hand on, and between the parts of the key."""


class SlabLinear(nn.Linear):
    """A linear layer that is multiplied in slabs of rows, as windows multiply a layer that is so large.

    A product of another shape may differ in the last bits, so a layer is multiplied in the same slabs everywhere.

    Args:
        linear: the layer whose weight and bias are used.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """The output [..., O] for inputs [..., I]."""
        return linear_in_slabs(x, self.weight.shape, self.weight.__getitem__, self.bias)


@dataclass(frozen=True, slots=True)
class HiddenLayout:
    """Shape in which the blocks of a model hand on hidden states. Everywhere else, hidden states are [B, S, D].

    Some models have several parallel hidden states for each token. Their D is the width of all of them together.
    """

    parallel: int = 1
    """Number P of parallel hidden states."""
    axis: int | None = None
    """Axis of the parallel hidden states: 0 if blocks take [P, B, S, D / P], 2 if they take [B, S, P, D / P], None if there is none."""

    @classmethod
    def of(cls, shape: Sequence[int], tokens: int) -> Self | None:
        """The layout of hidden states of one segment with a number of tokens; None if there is no layout of this shape."""
        if len(shape) == 3:
            return cls() if list(shape[:2]) == [1, tokens] else None
        if len(shape) == 4 and list(shape[:2]) == [1, tokens]:
            return cls(shape[2], 2)
        return cls(shape[0], 0) if len(shape) == 4 and list(shape[1:3]) == [1, tokens] else None

    def flat(self, x: Tensor) -> Tensor:
        """Hidden states [B, S, D], from the shape of the model."""
        return x if self.axis is None else x.movedim(self.axis, 2).flatten(2)

    def shaped(self, x_BSD: Tensor) -> Tensor:
        """Hidden states in the shape of the model, from [B, S, D]."""
        return x_BSD if self.axis is None else x_BSD.view(*x_BSD.shape[:2], self.parallel, -1).movedim(2, self.axis)


@dataclass(frozen=True, slots=True)
class SegmentValue:
    """An argument of blocks that depends on the tokens: every segment has its own tensor."""

    key: str
    """Name under which the tensors of all segments are stored."""
    shape: tuple[int, ...]
    """Shape of the tensor of one segment, without the dimension of the batch."""
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class BlockArguments:
    """Keyword arguments with which a model calls a block."""

    values: Mapping[str, Any]
    """Arguments for one segment, by name."""
    by_segment: Collection[str] = ()
    """Names of the arguments whose first dimension is the number of segments times another number, such as that of heads."""
    of_tokens: Mapping[str, SegmentValue] = field(default_factory=dict)
    """Arguments that depend on the tokens, by name. They are not in `values`."""
    layout: HiddenLayout = HiddenLayout()
    takes: Collection[str] = ()
    """Names of the arguments that are values which the block before returned after the hidden states; None if it returned None."""
    gives: Mapping[int, str] = field(default_factory=dict)
    """Place of each value that the block returns for the next one, and the name of the argument that it is there."""
    shared: Collection[str] = ()
    """Names of the arguments that are one dict for all blocks, empty at the first, in which blocks leave tensors for later ones."""
    kept: Collection[str] | None = None
    """Keys of the values that are handed on, because a later block reads them; None for all."""

    @property
    def hands_on(self) -> bool:
        """Whether the block may take or give values besides hidden states."""
        return bool(self.takes or self.gives or self.shared)

    def for_batch(self, size: int, beside: Mapping[str, Tensor] = NOTHING) -> dict[str, Any]:
        """Arguments for a batch of `size` segments.

        Args:
            size: number of segments.
            beside: a tensor [B, ...] for each key of `of_tokens`, and for each value that the block before handed on.
        """
        given = {
            name: _repeated(value, size) if name in self.by_segment else value for name, value in self.values.items()
        }
        given |= {name: beside[each.key] for name, each in self.of_tokens.items()}
        return given | {name: beside.get(STATE + name) for name in self.takes} | self._dicts(beside)

    def _dicts(self, beside: Mapping[str, Tensor]) -> dict[str, Any]:
        """Shared dicts with the tensors that the blocks before left in them."""
        found = {name: copy.copy(self.values[name]) for name in self.shared}
        for key, value in beside.items():
            name, *rest = key.removeprefix(STATE).split(STATE)
            if key.startswith(STATE) and rest and name in found:
                item: str | int = int(rest[0]) if rest[0].isdigit() else rest[0]
                found[name][item] = (*found[name].get(item, ()), value) if len(rest) > 1 else value
        return found

    def handed_on(self, named: Mapping[str, Any], returned: Sequence[Any]) -> dict[str, Tensor]:
        """Values that the block hands on, [B, ...], by key: `+argument` or `+argument+item+place`.

        Args:
            named: the arguments of the call, whose shared dicts the block has changed.
            returned: everything that the block returned.

        Raises:
            TypeError: a value is not a tensor.
        """
        found = {STATE + name: returned[place] for place, name in self.gives.items() if returned[place] is not None}
        for name in self.shared:
            for item, value in named[name].items():
                key = f"{STATE}{name}{STATE}{item}"
                if isinstance(value, Tensor):
                    found[key] = value
                else:
                    found |= {f"{key}{STATE}{place}": each for place, each in enumerate(value)}
        for key, each in found.items():
            if not isinstance(each, Tensor):
                raise TypeError(f"{key.removeprefix(STATE)} is no tensor")
        return found if self.kept is None else {key: each for key, each in found.items() if key in self.kept}


def handed_values(beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values beside hidden states that blocks hand on, by key."""
    return {key: value for key, value in beside.items() if key.startswith(STATE)}


def _repeated(value: Any, size: int) -> Any:
    """A tensor, or tensors in a tuple, for `size` segments."""
    if isinstance(value, tuple):
        return tuple(_repeated(each, size) for each in value)
    if not isinstance(value, Tensor) or not value.dim():
        return value
    rest = value.shape[1:]
    return value.expand(size, *rest) if value.shape[0] == 1 else value.repeat(size, *(1 for _ in rest))


def build_block(
    meta_model: MetaModel,
    index: int,
    source: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    linear_dtype: torch.dtype | None,
    without: Collection[str] = (),
) -> nn.Module:
    """Build a block with its weights, frozen. Its linear layers quantize their inputs if `source` has an input quantizer for them.

    Args:
        meta_model: the model to which the block belongs.
        index: number of the block.
        source: source of its tensors.
        device: device of its tensors.
        dtype: dtype of all parameters except the weights of linear layers. Buffers keep their dtype, unless this one holds more digits.
        linear_dtype: dtype of the weights of linear layers; None keeps the dtype in which they are stored.
        without: names of linear layers whose weights stay on the meta device.

    Raises:
        InputError: a tensor cannot be read.
    """
    spec = meta_model.blocks[index]
    block = copy.deepcopy(meta_model.templates[index])
    dtypes = {f"{name}.weight": linear_dtype for name in spec.linears}
    dtypes |= {name: _at_least(buffer.dtype, dtype) for name, buffer in block.named_buffers()}
    absent = {f"{name}.weight" for name in without}
    state = {
        local: source.read(name, device=device, dtype=dtypes.get(local, dtype))
        for local, name in spec.tensors.items()
        if local not in absent
    }
    block.load_state_dict(state, strict=False, assign=True)
    for buffer_name, buffer in list(block.named_buffers()):
        owner, _, leaf = buffer_name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, buffer.to(device))
    for name in spec.linears:
        if name not in without:
            _finish_linear(block, name, source.input_quantizer(spec.tensors[f"{name}.weight"]))
    return block.requires_grad_(requires_grad=False).eval()


def build_expert(
    expert: nn.Module,
    names: Mapping[str, str],
    source: WeightSource,
    *,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype | None],
) -> nn.Module:
    """Build a routed expert with its weights, frozen, from one whose linear layers have no weights.

    Args:
        expert: the expert in a block that was built without the weights of its experts; it is not changed.
        names: name in the checkpoint of the weight of each linear layer, by the name of the layer in the expert.
        source: source of the weights.
        device: device of the weights.
        dtypes: dtype of each weight, by the name of the layer; None keeps the dtype in which it is stored.

    Raises:
        InputError: a weight cannot be read.
    """
    built = copy.deepcopy(expert)
    for name, stored in names.items():
        weight = source.read(stored, device=device, dtype=dtypes[name])
        built.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        _finish_linear(built, name, source.input_quantizer(stored))
    return built.requires_grad_(requires_grad=False).eval()


def _finish_linear(module: nn.Module, name: str, quantizer: Callable[[Tensor], Tensor] | None) -> None:
    """Have a linear layer of a module multiply in slabs if it is large, and quantize its inputs if it has a quantizer for them."""
    linear = module.get_submodule(name)
    if isinstance(linear, nn.Linear) and in_slabs(linear.weight.shape):
        owner, _, leaf = name.rpartition(".")
        linear = SlabLinear(linear)
        setattr(module.get_submodule(owner), leaf, linear)
    if quantizer is not None:
        linear.register_forward_pre_hook(partial(_quantize_input, quantizer))


def _at_least(found: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a buffer is read: a bias of a router in float32 is not rounded to bf16 if the model computes in float32."""
    return torch.promote_types(found, dtype) if found.is_floating_point else found


def _quantize_input(quantizer: Callable[[Tensor], Tensor], linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return quantizer(inputs[0])


def run_block(
    block: nn.Module,
    x_BSD: Tensor,
    arguments: BlockArguments,
    weights: Mapping[str, Tensor] | None = None,
    *,
    beside: Mapping[str, Tensor] = NOTHING,
) -> Tensor:
    """Hidden states [B, S, D] after the block. See `advance`."""
    return advance(block, x_BSD, arguments, weights, beside=beside)[0]


def advance(
    block: nn.Module,
    x_BSD: Tensor,
    arguments: BlockArguments,
    weights: Mapping[str, Tensor] | None = None,
    *,
    beside: Mapping[str, Tensor] = NOTHING,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Hidden states [B, S, D] after the block, and the values beside them. The block is called as the model calls it.

    Args:
        block: the block.
        x_BSD: hidden states before the block.
        arguments: keyword arguments of the block.
        weights: tensors that replace parameters of the block, by name.
        beside: values of the segments beside the hidden states, [B, ...] by key: those that depend only on the tokens, and those that
            the block before handed on.
    """
    named, x = arguments.for_batch(len(x_BSD), beside), arguments.layout.shaped(x_BSD)
    output: Tensor | tuple[Any, ...] = (
        block(x, **named) if weights is None else functional_call(block, dict(weights), (x,), named)
    )
    returned = (output,) if isinstance(output, Tensor) else output
    if arguments.hands_on:
        kept = {key: value for key, value in beside.items() if not key.startswith(STATE)}
        beside = kept | arguments.handed_on(named, returned)
    return arguments.layout.flat(returned[0]), beside
