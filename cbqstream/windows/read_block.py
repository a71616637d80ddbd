"""Reading of a block of the model into memory, with or without its routed experts."""

from collections.abc import Mapping

from torch import nn

from cbqstream.checkpoint.tensors import StoredTensors
from cbqstream.disk import ScratchFile
from cbqstream.errors import UsageError
from cbqstream.models.block import BlockArguments, build_block
from cbqstream.models.experts import Experts
from cbqstream.models.meta_model import MetaModel
from cbqstream.records import BlockSpec, Compute
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.windows.quantized_linear import replace_linears
from cbqstream.windows.resident_block import ResidentBlock
from cbqstream.windows.routed_experts import RoutedExperts, expert_layers


def read_block(
    meta_model: MetaModel,
    index: int,
    source: StoredTensors,
    schemes: Mapping[str, Scheme],
    arguments: BlockArguments,
    compute: Compute,
    scratch: Scratch,
    file: ScratchFile | None = None,
    *,
    experts_alone: bool = False,
) -> ResidentBlock:
    """Read a block with its original weights.

    Args:
        meta_model: the model to which the block belongs.
        index: number of the block.
        source: source of its tensors.
        schemes: schemes of the quantized layers, by their name in the block.
        arguments: keyword arguments with which the model calls the block.
        compute: device and dtype of the block.
        scratch: buffers for weights that are needed for a moment.
        file: file to which the quantized layers are offloaded; None keeps them in memory.
        experts_alone: whether the weights of the routed experts are not read.
    """
    device, dtype, spec = compute.device, compute.dtype, meta_model.blocks[index]
    routed = routed_experts_of(meta_model, index) if experts_alone else None
    apart = set[str]() if routed is None else set(expert_layers(spec, routed))
    schemes = {name: scheme for name, scheme in schemes.items() if name not in apart}
    without = apart if file is None else {*apart, *schemes}
    module = build_block(meta_model, index, source, device=device, dtype=dtype, linear_dtype=None, without=without)
    layers = replace_linears(module, schemes, scratch)
    if file is not None:
        for name, layer in layers.items():
            layer.weight = source.read(spec.tensors[f"{name}.weight"], device=device)
            layer.offload(file)
    whole = set(spec.linears) - schemes.keys()  # they are not smoothed, because rescaled channels would change them
    for name in whole:
        module.get_submodule(name).to(dtype)
    pairs = meta_model.smoothing_pairs(index)
    usable = tuple(pair for pair in pairs if not whole & {pair.smooth_layer, *pair.balance_layers})
    return ResidentBlock(index, module, arguments, layers, usable, with_experts(module, spec, routed))


def routed_experts_of(meta_model: MetaModel, index: int) -> str | None:
    """Name of the module of the routed experts in a block; None if it has none.

    Raises:
        UsageError: its experts cannot be computed one at a time.
    """
    found = _experts_in(meta_model.templates[index])
    if not _one_at_a_time(found):
        raise UsageError(
            f"{meta_model.blocks[index].prefix}: its experts cannot be computed one at a time. Use --experts window."
        )
    return next(iter(found), None)


def can_be_alone(meta_model: MetaModel) -> bool:
    """Whether the experts of all blocks can be computed one at a time."""
    return all(_one_at_a_time(_experts_in(block)) for block in meta_model.templates)


def _experts_in(block: nn.Module) -> dict[str, Experts]:
    return {name: each for name, each in block.named_modules() if isinstance(each, Experts)}


def _one_at_a_time(found: Mapping[str, Experts]) -> bool:
    return len(found) <= 1 and all(type(each) is Experts for each in found.values())


def with_experts(module: nn.Module, spec: BlockSpec, name: str | None) -> RoutedExperts | None:
    """The routed experts of a block that was built without their weights.

    Args:
        module: the block.
        spec: names of its parts.
        name: name of the module of the experts in the block; None if it has none.
    """
    experts = None if name is None else module.get_submodule(name)
    return RoutedExperts(spec, name, experts) if name is not None and isinstance(experts, Experts) else None
