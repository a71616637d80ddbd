"""The scheme of every layer of a model, from the settings, and whether the layers can be quantized that way."""

import re
from collections.abc import Mapping

from cbqstream.config import QuantizeConfig
from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.families import joined_with
from cbqstream.models.meta_model import MetaModel
from cbqstream.records import BlockSpec, TensorInfo
from cbqstream.scheme import LayerSchemes, Scheme, path_pattern


def layer_schemes(config: QuantizeConfig, spec: BlockSpec) -> dict[str, Scheme]:
    """Schemes of the layers of a block that are quantized, by their name in the block.

    Raises:
        UsageError: a pattern matches a layer by its module path and not by its name in the checkpoint, or the other way round.
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
        UsageError: the head is tied to the embeddings, or --ignore leaves it in full precision.
    """
    scheme = _scheme_of(config, config.schemes, *meta_model.head)
    if meta_model.is_head_tied or scheme is None:
        what = "is tied to the embeddings" if meta_model.is_head_tied else "is left in full precision by --ignore"
        raise UsageError(f"the head {what}. Leave out --quantize-lm-head.")
    return scheme


def require_quantizable(config: QuantizeConfig, meta_model: MetaModel, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse settings that do not fit the layers of a model.

    Raises:
        UsageError: a pattern matches nothing, nothing is left to quantize, or groups or joined layers do not fit.
        InputError: weights have a dtype that is not supported.
    """
    kept = config.keep_first + config.keep_last
    if kept >= len(meta_model.blocks):
        raise UsageError(
            f"keep_first + keep_last is {kept} and the model has {len(meta_model.blocks)} blocks; nothing is left to quantize."
        )
    _require_matches(config, meta_model)
    if config.quantize_lm_head:
        _require_storable(infos[meta_model.head[1]], head_scheme(config, meta_model))
    for spec in meta_model.blocks[config.keep_first : len(meta_model.blocks) - config.keep_last]:
        layers = layer_schemes(config, spec)
        if not layers:
            raise UsageError(
                f"--ignore leaves no layer of {spec.prefix} to quantize. For whole blocks: --keep-first, --keep-last."
            )
        _require_alike(spec, layers)
        for name, scheme in layers.items():
            _require_storable(infos[spec.tensors[f"{name}.weight"]], scheme)


def _require_matches(config: QuantizeConfig, meta_model: MetaModel) -> None:
    """Refuse a pattern that matches no module: a typing error would otherwise be noticed after hours, if at all."""
    paths = [f"{spec.prefix}.{name}" for spec in meta_model.blocks for name in spec.linears]
    stored = [spec.tensors[f"{name}.weight"] for spec in meta_model.blocks for name in spec.linears]
    paths += [name.removesuffix(".weight") for name in (*stored, meta_model.head[1])]
    paths += meta_model.never_quantized
    for pattern in (*config.ignore, *(text.rpartition("=")[0] for text in config.override)):
        if not any(re.fullmatch(path_pattern(pattern), path) for path in paths):
            raise UsageError(
                f'"{shown(pattern)}" matches no layer. A path is such as {paths[0]}; whole parts of it, * and ? can be used.'
            )


def _scheme_of(config: QuantizeConfig, chosen: LayerSchemes, path: str, weight: str) -> Scheme | None:
    """Scheme of the layer with a module path, whose weight has a name in the checkpoint; None leaves it in full precision."""
    paths = (path, weight.removesuffix(".weight"))
    schemes = [None if config.is_ignored(one) else chosen.of(one) for one in paths]
    if schemes[0] != schemes[1]:
        raise UsageError(
            f"--ignore or --override matches {paths[0]} and not {paths[1]}, its name in the checkpoint. Match both."
        )
    return schemes[0]


def _require_alike(spec: BlockSpec, layers: Mapping[str, Scheme]) -> None:
    """Refuse different schemes in layers that inference engines join."""
    joined: dict[str, str] = {}
    for name in spec.linears:
        first = joined.setdefault(joined_with(name), name)
        if layers.get(first) != layers.get(name):
            raise UsageError(
                f"{spec.prefix}: inference engines compute {first} and {name} as one layer, so they need one scheme. Name both."
            )


def _require_storable(info: TensorInfo, scheme: Scheme) -> None:
    scheme.require_whole_groups(info.name, info.shape[1])
    if not info.dtype.is_floating_point:
        raise InputError(info.file, f"dtype {info.dtype}; weights must be bf16, fp16 or fp32.", tensor=info.name)
