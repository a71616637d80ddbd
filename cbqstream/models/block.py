"""One transformer block with its weights: built, used, dropped."""

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cbqstream.models.meta_model import MetaModel
from cbqstream.numerics.slabs import in_slabs, linear_in_slabs
from cbqstream.records import WeightSource

BlockArguments = Mapping[str, Any]


class _LinearInSlabs(nn.Linear):
    """A layer so large that windows multiply it in slabs of rows: a product of another shape has other last bits."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_in_slabs(x, self.weight.shape, self.weight.__getitem__, self.bias)


_BY_SEGMENT = ("alibi",)
"""Arguments whose first dimension goes through the segments of a batch, and then through something else."""


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
    """Block `index` with its weights, frozen, on `device`; layers whose inputs the source wants quantized do that.

    Args:
        meta_model: the model it belongs to.
        index: which block.
        source: where its tensors come from.
        device: where it goes.
        dtype: of everything but the weights of linear layers.
        linear_dtype: of those; None keeps them as they are stored.
        without: linear layers whose weights are left on the meta device.

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
        if quantizer is not None:
            linear.register_forward_pre_hook(partial(_quantize_input, quantizer))
        if isinstance(linear, nn.Linear) and in_slabs(linear.weight.shape):
            linear.__class__ = _LinearInSlabs  # a forward of its own would keep the layer in a cycle
    return block.requires_grad_(requires_grad=False).eval()


def _quantize_input(quantizer: Callable[[Tensor], Tensor], linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return quantizer(inputs[0])


def run_block(
    block: nn.Module, x_BSD: Tensor, arguments: BlockArguments, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Hidden states [B, S, D] after the block, called as the model itself calls it; with other `weights` by name, where they are given."""
    arguments = {
        name: value.repeat(len(x_BSD), *(1 for _ in value.shape[1:]))
        if name in _BY_SEGMENT and value is not None
        else value
        for name, value in arguments.items()
    }
    output: Tensor | tuple[Tensor, ...] = (
        block(x_BSD, **arguments) if weights is None else functional_call(block, dict(weights), (x_BSD,), arguments)
    )
    return output if isinstance(output, Tensor) else output[0]
