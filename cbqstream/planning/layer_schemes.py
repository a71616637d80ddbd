"""The schemes that the settings give to the layers of a model, and checks that the layers can be quantized with them."""

import math
import re
from collections.abc import Iterable, Mapping

from cbqstream.checkpoint.tensors import ModelTensor
from cbqstream.config import QuantizeConfig
from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.families import VISION_PARTS, joined_with
from cbqstream.models.meta_model import MetaModel
from cbqstream.models.probe import NEVER_CALLED
from cbqstream.records import BlockSpec
from cbqstream.scheme import LayerSchemes, Scheme, path_pattern
from cbqstream.windows.read_block import routed_experts_of

_LEAST_SHARE = 0.8
"""Share of the weights of the blocks below which a model is only quantized on request."""


def layer_schemes(config: QuantizeConfig, spec: BlockSpec) -> dict[str, Scheme]:
    """Schemes of the quantized layers of a block, by their name in the block.

    Raises:
        UsageError: a pattern matches only one of the module path of a layer and its name in the checkpoint.
    """
    found, chosen = {}, config.schemes
    for name in spec.linears:
        scheme = _scheme_of(config, chosen, f"{spec.prefix}.{name}", spec.tensors[f"{name}.weight"])
        if scheme is not None:
            found[name] = scheme
    return found


def head_scheme(config: QuantizeConfig, meta_model: MetaModel) -> Scheme:
    """The scheme of a quantized head.

    Raises:
        UsageError: the head is tied to the embedding, or --ignore leaves it in full precision.
    """
    scheme = _scheme_of(config, config.schemes, *meta_model.head)
    if meta_model.is_head_tied or scheme is None:
        what = "is tied to the embedding" if meta_model.is_head_tied else "is left in full precision by --ignore"
        raise UsageError(f"the head {what}. Leave out --quantize-lm-head.")
    return scheme


def _block_weights(meta_model: MetaModel) -> int:
    """Number of weights in all matrices of all blocks, without biases and norms."""
    return sum(
        math.prod(shape) for block in range(len(meta_model.blocks)) for shape in _matrices(meta_model, block).values()
    )


def quantized_share(config: QuantizeConfig, meta_model: MetaModel) -> float:
    """Share of the weights of all blocks that a run quantizes, from 0 to 1."""
    first, stop = config.keep_first, len(meta_model.blocks) - config.keep_last
    layers = {spec.index: layer_schemes(config, spec) for spec in meta_model.blocks[first:stop]}
    return _share(meta_model, layers)


def require_quantizable(
    config: QuantizeConfig,
    meta_model: MetaModel,
    *,
    allow_partial: bool,
) -> None:
    """Check that the settings fit the layers of a model.

    Args:
        config: settings of the run.
        meta_model: the model.
        allow_partial: accept a model most of whose block weights are not in linear layers.

    Raises:
        UsageError: a pattern matches no layer, no layer is left to quantize, the group size does not divide the columns of a layer, or
            layers that inference engines join have different schemes.
        InputError: a tensor of the model has a dtype that is not supported, or too few weights are in linear layers.
    """
    for name in (*meta_model.outer.values(), *(name for spec in meta_model.blocks for name in spec.tensors.values())):
        meta_model.infos[name].require_readable()
    kept = config.keep_first + config.keep_last
    if kept >= len(meta_model.blocks):
        raise UsageError(
            f"keep_first + keep_last is {kept}. It must be below the {len(meta_model.blocks)} blocks of the model."
        )
    _require_matches(config, meta_model)
    if config.quantize_lm_head:
        _require_storable(meta_model.infos[meta_model.head[1]], head_scheme(config, meta_model))
    for spec in meta_model.blocks[config.keep_first : len(meta_model.blocks) - config.keep_last]:
        layers = layer_schemes(config, spec)
        if not layers:
            raise UsageError(
                f"--ignore leaves no layer of {spec.prefix} to quantize. For whole blocks: --keep-first, --keep-last."
            )
        _require_alike(spec, layers, meta_model.left_out[spec.index])
        for name, scheme in layers.items():
            _require_storable(meta_model.infos[spec.tensors[f"{name}.weight"]], scheme)
    if not allow_partial:
        _require_share(meta_model)
    if config.reconstruction.experts == "alone":
        _require_experts_alone(config, meta_model)


def _require_experts_alone(config: QuantizeConfig, meta_model: MetaModel) -> None:
    """Check that the experts of a model can be reconstructed alone with these settings.

    Raises:
        UsageError: they cannot.
    """
    settings = config.reconstruction
    modules = {routed_experts_of(meta_model, spec.index) for spec in meta_model.blocks}
    if modules == {None}:
        raise UsageError(f"{meta_model.folder}: has no routed experts. Leave out --experts alone.")
    for possible, what, remedy in (
        (config.window.size == 1, "windows of one block", "--window-size 1 --overlap 0"),
        (not settings.kl_weight, "no KL divergence over the hidden dimension", "--kl-weight 0"),
        (not settings.end_to_end_epochs, "no end-to-end stage", "--end-to-end-epochs 0"),
    ):
        if not possible:
            raise UsageError(f"--experts alone needs {what}. Use {remedy}.")


def _require_share(meta_model: MetaModel) -> None:
    """Check that most weights of the blocks are in linear layers.

    Raises:
        InputError: less than 80 % of them are.
    """
    share = _share(meta_model, {spec.index: spec.linears for spec in meta_model.blocks})
    if share < _LEAST_SHARE:
        held = _matrices(meta_model, 0)
        linears = {f"{name}.weight" for name in meta_model.blocks[0].linears}
        largest = max(held.keys() - linears, key=lambda name: math.prod(held[name]), default="")
        raise InputError(
            meta_model.folder,
            f"only {share:.0%} of the weights of the blocks are in linear layers; the others, such as"
            f" {meta_model.blocks[0].prefix}.{largest}, would stay in full precision. Use --allow-partial to accept that.",
        )


def _share(meta_model: MetaModel, layers: Mapping[int, Iterable[str]]) -> float:
    """Share of the weights of all blocks that are in some layers, given by their names in each block."""
    weights = 0
    for index, names in layers.items():
        shapes = _matrices(meta_model, index)
        weights += sum(math.prod(shapes[f"{name}.weight"]) for name in names)
    return weights / _block_weights(meta_model)


def _matrices(meta_model: MetaModel, index: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters with two or more dimensions that a block has for text, by their name in the block."""
    named = meta_model.templates[index].named_parameters()
    unused = {f"{name}.weight" for name, reason in meta_model.left_out[index].items() if reason == NEVER_CALLED}
    text = ((name, value) for name, value in named if not {*VISION_PARTS} & {*name.split(".")} and name not in unused)
    return {name: tuple(value.shape) for name, value in text if value.dim() > 1}


def _require_matches(config: QuantizeConfig, meta_model: MetaModel) -> None:
    """Check that every pattern matches a module. Otherwise a typing error would be noticed only in the result, after hours.

    Raises:
        UsageError: a pattern matches no module.
    """
    paths = [f"{spec.prefix}.{name}" for spec in meta_model.blocks for name in spec.linears]
    stored = [spec.tensors[f"{name}.weight"] for spec in meta_model.blocks for name in spec.linears]
    paths += [name.removesuffix(".weight") for name in (*stored, meta_model.head[1])]
    paths += meta_model.never_quantized
    for pattern in (*config.ignore, *(text.rpartition("=")[0] for text in config.override)):
        if not any(re.fullmatch(path_pattern(pattern), path) for path in paths):
            raise UsageError(
                f'"{shown(pattern)}" matches no layer. Use a path such as {paths[0]}, whole parts of a path, or the wildcards * and ?.'
            )


def _scheme_of(config: QuantizeConfig, chosen: LayerSchemes, path: str, weight: str) -> Scheme | None:
    """Scheme of a layer; None if it stays in full precision.

    Args:
        config: settings of the run.
        chosen: schemes of the settings.
        path: module path of the layer.
        weight: name of its weight in the checkpoint.

    Raises:
        UsageError: a pattern matches only one of the module path and the name in the checkpoint.
    """
    paths = (path, weight.removesuffix(".weight"))
    schemes = [None if config.is_ignored(one) else chosen.of(one) for one in paths]
    if schemes[0] != schemes[1]:
        raise UsageError(
            f"--ignore or --override matches {paths[0]} and not {paths[1]}, its name in the checkpoint. Match both."
        )
    return schemes[0]


def _require_alike(spec: BlockSpec, layers: Mapping[str, Scheme], left_out: Iterable[str]) -> None:
    """Check that layers that inference engines compute as one layer have the same scheme.

    Raises:
        UsageError: their schemes differ.
    """
    joined: dict[str, str] = {}
    for name in (*spec.linears, *left_out):
        first = joined.setdefault(joined_with(name), name)
        if layers.get(first) != layers.get(name):
            raise UsageError(
                f"{spec.prefix}: inference engines compute {first} and {name} as one layer, so they need one scheme. Name both."
            )


def _require_storable(info: ModelTensor, scheme: Scheme) -> None:
    """Check that a weight fits its scheme.

    Raises:
        UsageError: the group size does not divide the columns.
        InputError: the weight has a dtype that is not supported.
    """
    scheme.require_whole_groups(info.name, info.shape[1])
    if not info.dtype.is_floating_point:
        dtype = str(info.dtype).removeprefix("torch.")
        raise InputError(info.file, f"has dtype {dtype}. Convert it to bf16, fp16 or fp32.", tensor=info.name)
