"""One transformer block with its weights: building and running it."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.models.meta_model import MetaModel
from cbqstream.numerics.slabs import in_slabs, linear_in_slabs


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
class BlockArguments:
    """Keyword arguments with which a model calls a block."""

    values: Mapping[str, Any]
    """Arguments for one segment, by name."""
    by_segment: Collection[str] = ()
    """Names of the arguments whose first dimension is the number of segments times another number, such as that of heads."""

    def for_batch(self, size: int) -> dict[str, Any]:
        """Arguments for a batch of `size` segments."""
        return {
            name: value.repeat(size, *(1 for _ in value.shape[1:]))
            if name in self.by_segment and value is not None
            else value
            for name, value in self.values.items()
        }


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
        dtype: dtype of all parameters except the weights of linear layers; buffers keep their dtype.
        linear_dtype: dtype of the weights of linear layers; None keeps the dtype in which they are stored.
        without: names of linear layers whose weights stay on the meta device.

    Raises:
        InputError: a tensor cannot be read.
    """
    spec = meta_model.blocks[index]
    block = copy.deepcopy(meta_model.templates[index])
    dtypes = {f"{name}.weight": linear_dtype for name in spec.linears}
    dtypes |= {name: buffer.dtype for name, buffer in block.named_buffers()}
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
        linear, quantizer = block.get_submodule(name), source.input_quantizer(spec.tensors[f"{name}.weight"])
        if isinstance(linear, nn.Linear) and in_slabs(linear.weight.shape):
            owner, _, leaf = name.rpartition(".")
            linear = SlabLinear(linear)
            setattr(block.get_submodule(owner), leaf, linear)
        if quantizer is not None:
            linear.register_forward_pre_hook(partial(_quantize_input, quantizer))
    return block.requires_grad_(requires_grad=False).eval()


def _quantize_input(quantizer: Callable[[Tensor], Tensor], linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return quantizer(inputs[0])


def run_block(
    block: nn.Module, x_BSD: Tensor, arguments: BlockArguments, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Hidden states [B, S, D] after the block, which is called as the model calls it.

    Args:
        block: the block.
        x_BSD: hidden states before the block.
        arguments: keyword arguments of the block.
        weights: tensors that replace parameters of the block, by name.
    """
    named = arguments.for_batch(len(x_BSD))
    output: Tensor | tuple[Tensor, ...] = (
        block(x_BSD, **named) if weights is None else functional_call(block, dict(weights), (x_BSD,), named)
    )
    return output if isinstance(output, Tensor) else output[0]
