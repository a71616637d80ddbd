"""The quantization_config of config.json in the form of compressed-tensors, and the checks of a checkpoint against it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationConfig

from cbqstream.checkpoint.folder import quant_method_of, quantization_of
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.families import JOINED
from cbqstream.packed.layout import COPY_AGAIN
from cbqstream.packed.layouts import LAYOUTS, layout_of, layouts_in
from cbqstream.scheme import ActivationStrategy, LayerSchemes, Scheme

METHOD, _MIXED = "compressed-tensors", "mixed-precision"
_ACTIVATIONS: dict[ActivationStrategy, dict[str, Any]] = {
    "token": {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "tensor": {"type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
}


def quantization_config(schemes: LayerSchemes, not_quantized: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of config.json, with keys of compressed-tensors 0.17 only.

    Args:
        schemes: schemes of the layers. Each becomes a group of layers, the default one with the target `Linear` and the others with
            regular expressions. Programs that read the file give regular expressions precedence over `Linear`.
        not_quantized: module paths, or regular expressions for module paths after `re:`.
    """
    # vLLM looks a joined layer up by its own name first, then by `Linear`, and by the names of its parts last
    joined = [
        (re.sub(rf"\b{leaves[0]}\b", name, pattern), scheme)
        for pattern, scheme in schemes.others
        for name, leaves in JOINED.items()
        if re.search(rf"\b{leaves[0]}\b", pattern)
    ]
    others = [*schemes.others, *joined]
    targets = [([f"re:{pattern}$"], scheme) for pattern, scheme in others] + [(["Linear"], schemes.default)]
    groups = {f"group_{index}": _group(*pair) for index, pair in enumerate(targets)}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "ignore": list(not_quantized),
        "config_groups": groups,
    }


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    activations = {"num_bits": scheme.activation_bits, **_ACTIVATIONS[scheme.activation_strategy]}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations if scheme.activation_bits else None,
        "output_activations": None,
        "format": layout_of(scheme).format,
    }


def schemes_of(config: dict[str, Any]) -> LayerSchemes:
    """Schemes of the layers, read from a quantization_config that `quantization_config` made.

    Raises:
        UsageError: it describes another method, or has a form that `quantization_config` does not make.
    """
    try:
        found = [(target, scheme) for target, scheme, _ in _groups(config)]
        ignored = frozenset(config.get("ignore") or ())
        patterns = tuple(re.compile(name[3:]).pattern for name in sorted(ignored) if name.startswith("re:"))
    except (AttributeError, LookupError, TypeError, re.error) as error:
        raise not_supported(config) from error
    default = [scheme for target, scheme in found if target == "Linear"]
    others = tuple(
        (target[3:-1], scheme) for target, scheme in found if target.startswith("re:") and target.endswith("$")
    )
    if len(default) != 1 or len(others) != len(found) - 1:
        raise not_supported(config)
    return LayerSchemes(default[0], others, ignored, patterns)


def schemes_if_own(config: dict[str, Any] | None) -> LayerSchemes | None:
    """Schemes of the layers of a quantized model; None if its quantization_config does not have the form that `quantize` writes."""
    try:
        return None if config is None else schemes_of(config)
    except UsageError:
        return None


def schemes_of_result(folder: Path, config: Mapping[str, Any]) -> LayerSchemes:
    """Schemes of the layers of a result of `quantize`.

    Args:
        folder: folder of the result.
        config: content of its config.json.

    Raises:
        InputError: the model is not quantized.
        UsageError: it is quantized in another form.
    """
    quantization = quantization_of(folder, config)
    if quantization is None:
        raise InputError(folder / "config.json", "the model is not quantized. Give a result of cbqstream quantize.")
    return schemes_of(quantization)


def _groups(config: dict[str, Any]) -> list[tuple[str, Scheme, str]]:
    """Target, scheme and format of each group of layers of a quantization_config."""
    return [_read_group(config, group) for group in config["config_groups"].values()]


def _read_group(config: dict[str, Any], group: dict[str, Any]) -> tuple[str, Scheme, str]:
    weights: dict[str, Any] = group.get("weights") or {}
    activations: dict[str, Any] = group.get("input_activations") or {}
    strategy = activations.get("strategy", "token")
    as_written = activations.items() >= _ACTIVATIONS.get(strategy, {"strategy": None}).items()
    targets, layout = group.get("targets"), LAYOUTS.get(str(group.get("format") or config.get("format")))
    known = (
        config.get("quant_method") == METHOD
        and weights.get("type") == "int"
        and weights.get("strategy") in ("channel", "group")
        and not weights.get("actorder")
        and (not activations or as_written)
        and isinstance(targets, list)
        and len(targets) == 1
    )
    if not known or layout is None:
        raise not_supported(config)
    scheme = Scheme(
        num_bits=weights["num_bits"],
        group_size=weights["group_size"] if weights["strategy"] == "group" else None,
        symmetric=weights["symmetric"],
        activation_bits=activations.get("num_bits"),
        activation_strategy=strategy,
    )
    if not layout.can_hold(scheme):
        raise not_supported(config)
    return str(group["targets"][0]), scheme, layout.format


def faults_of(config: dict[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    """Problems of the quantized layers of a checkpoint, one line each: missing or wrong tensors, an invalid quantization_config.

    Args:
        config: the quantization_config of config.json.
        checkpoint: the checkpoint. Only its headers and the tensors `weight_shape` are read.

    Raises:
        UsageError: the quantization_config has a form that is not supported.
    """
    try:
        QuantizationConfig.model_validate(config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        yield f"compressed-tensors cannot read the quantization_config: {shown(str(error).splitlines()[0])}."
    schemes = schemes_of(config)
    formats = {scheme: name for _, scheme, name in _groups(config)}
    for layer, layout in layouts_in(checkpoint.stored, schemes).items():
        scheme = schemes.of(layer)
        if layout.format != formats[scheme]:
            yield f"{layer}: stored as {layout.format}, but config.json says {formats[scheme]}. {COPY_AGAIN}"
        yield from (f"{layer}: {fault}. {COPY_AGAIN}" for fault in layout.faults(checkpoint, layer, scheme))


def not_supported(config: object) -> UsageError:
    """The error for a quantization_config that is not supported, with its `quant_method`."""
    problem = f"the model is already quantized ({quant_method_of(config)}) in a form that is not supported"
    remedy = "Give the original model, or a result of cbqstream quantize."
    return UsageError(f"{problem}. {remedy}")
