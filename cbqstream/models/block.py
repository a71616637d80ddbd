"""One transformer block with its weights: built, used, dropped."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cbqstream.models.skeleton import ModelSkeleton
from cbqstream.records import WeightSource

BlockArguments = Mapping[str, Any]


def build_block(
    skeleton: ModelSkeleton,
    index: int,
    source: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    linear_dtype: torch.dtype | None,
) -> nn.Module:
    """Block `index` with its weights, frozen, on `device`; layers whose inputs the source wants quantized do that.

    Args:
        skeleton: the model it belongs to.
        index: which block.
        source: where its tensors come from.
        device: where it goes.
        dtype: of everything but the weights of linear layers.
        linear_dtype: of those; None keeps them as they are stored.

    Raises:
        InputError: a tensor cannot be read.
    """
    spec = skeleton.blocks[index]
    block = copy.deepcopy(skeleton.templates[index])
    linear_weights = {f"{name}.weight" for name in spec.linears}
    state = {
        local: source.read(name, device=device, dtype=linear_dtype if local in linear_weights else dtype)
        for local, name in spec.tensors.items()
    }
    block.load_state_dict(state, strict=False, assign=True)
    for buffer_name, buffer in list(block.named_buffers()):
        owner, _, leaf = buffer_name.rpartition(".")
        block.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=False)
    for name in spec.linears:
        quantizer = source.input_quantizer(spec.tensors[f"{name}.weight"])
        if quantizer is not None:
            block.get_submodule(name).register_forward_pre_hook(partial(_quantize_input, quantizer))
    return block.requires_grad_(requires_grad=False).eval()


def _quantize_input(quantizer: Callable[[Tensor], Tensor], linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return quantizer(inputs[0])


def run_block(
    block: nn.Module, x_BSD: Tensor, arguments: BlockArguments, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Hidden states [B, S, D] after the block, called as the model itself calls it; with other `weights` by name, where they are given."""
    output: Tensor | tuple[Tensor, ...] = (
        block(x_BSD, **arguments)
        if weights is None
        else functional_call(block, dict(weights), (x_BSD,), dict(arguments))
    )
    return output if isinstance(output, Tensor) else output[0]
