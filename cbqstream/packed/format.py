"""The format `pack-quantized` of compressed-tensors: names and bit layout of the tensors, and the quantization_config of config.json.

compressed-tensors defines names and bit layout, and its functions pack and unpack here. A linear layer `NAME` with a weight [O, I] and G
groups in a row is stored as

    NAME.weight_packed      int32 [O, ceil(I * num_bits / 32)]           codes + 2^(num_bits - 1), without gaps along the row
    NAME.weight_scale       dtype of the original weight [O, G]
    NAME.weight_zero_point  int32 [ceil(O * num_bits / 32), G]           if asymmetric; packed along dimension 0
    NAME.weight_shape       int64 [2]                                    O and I
    NAME.input_scale        dtype of the original weight [1]             if inputs have one step size
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from cbqstream.checkpoint.folder import quant_method_of
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.families import JOINED
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import ActivationStrategy, LayerSchemes, Scheme

PACKED, SCALE, ZERO_POINT, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
INPUT_SCALE = "input_scale"
_WORD = 32
_SLAB_ROWS = 128 * _WORD  # a multiple of 32, so that the zero points of every slab but the last fill whole words
METHOD, FORMAT = "compressed-tensors", "pack-quantized"
_ACTIVATIONS: dict[ActivationStrategy, dict[str, Any]] = {
    "token": {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "tensor": {"type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
}


def parts_of(scheme: Scheme) -> tuple[str, ...]:
    """Last parts of the names of the tensors from which a weight is decoded."""
    return (PACKED, SCALE, SHAPE) if scheme.symmetric else (PACKED, SCALE, SHAPE, ZERO_POINT)


def encode(weight: QuantizedWeight, *, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack a weight.

    Args:
        weight: the quantized weight, on any device.
        scale_dtype: dtype in which scales and the step size of the inputs are stored.

    Returns:
        The stored tensors, on the CPU, by the last part of their name.
    """
    bits = weight.scheme.num_bits
    tensors = {
        PACKED: pack_to_int32(weight.codes.cpu(), bits),
        SCALE: weight.scale.cpu().to(scale_dtype),
        SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors[ZERO_POINT] = pack_to_int32(weight.zero_point.cpu(), bits, packed_dim=0).contiguous()
    if weight.input_scale is not None:
        tensors[INPUT_SCALE] = weight.input_scale.cpu().to(scale_dtype)
    return tensors


def encode_in_slabs(weight: QuantizedWeight, *, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack a weight in slabs of rows; the result is that of `encode`.

    Packing a head of a billion weights at once would take many times its size.
    """
    slabs = [
        encode(weight.rows(slice(start, start + _SLAB_ROWS)), scale_dtype=scale_dtype)
        for start in range(0, weight.codes.shape[0], _SLAB_ROWS)
    ]
    rows = {part: torch.cat([slab[part] for slab in slabs]) for part in slabs[0] if part not in (SHAPE, INPUT_SCALE)}
    return {**slabs[0], **rows, SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64)}


def decode(tensors: dict[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Unpack a weight: the inverse of `encode`, except that the step size of the inputs is not restored.

    Args:
        tensors: stored tensors by the last part of their name, at least those of `parts_of(scheme)`, on one device.
        scheme: scheme of the weight.
    """
    rows, columns = tensors[SHAPE].tolist()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=tensors[PACKED].device)
    for start in range(0, rows, _SLAB_ROWS):  # unpacking at once takes up to eight times the size of the codes
        slab = codes[start : start + _SLAB_ROWS]
        slab.copy_(unpack_from_int32(tensors[PACKED][start : start + _SLAB_ROWS], scheme.num_bits, slab.shape))
    scale = tensors[SCALE].float()
    zero_point = None
    if not scheme.symmetric:
        zero_point = unpack_from_int32(tensors[ZERO_POINT], scheme.num_bits, scale.shape, packed_dim=0)
    return QuantizedWeight(codes, scale, zero_point, scheme)


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
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": list(not_quantized),
        "config_groups": {f"group_{index}": _group(*pair) for index, pair in enumerate(targets)},
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
        "format": FORMAT,
    }


def schemes_of(config: dict[str, Any]) -> LayerSchemes:
    """Schemes of the layers, read from a quantization_config that `quantization_config` made.

    Raises:
        UsageError: it describes another method, or has a form that `quantization_config` does not make.
    """
    try:
        found = [_read_group(config, group) for group in config["config_groups"].values()]
    except (AttributeError, LookupError, TypeError) as error:
        raise not_supported(config) from error
    default = [scheme for target, scheme in found if target == "Linear"]
    others = tuple(
        (target[3:-1], scheme) for target, scheme in found if target.startswith("re:") and target.endswith("$")
    )
    if len(default) != 1 or len(others) != len(found) - 1:
        raise not_supported(config)
    return LayerSchemes(default[0], others)


def schemes_of_result(folder: Path, config: Mapping[str, Any]) -> LayerSchemes:
    """Schemes of the layers of a result of `quantize`.

    Args:
        folder: folder of the result.
        config: content of its config.json.

    Raises:
        InputError: the model is not quantized.
        UsageError: it is quantized in another form.
    """
    if not config.get("quantization_config"):
        raise InputError(folder / "config.json", "the model is not quantized. Give a result of cbqstream quantize.")
    return schemes_of(config["quantization_config"])


def _read_group(config: dict[str, Any], group: dict[str, Any]) -> tuple[str, Scheme]:
    weights: dict[str, Any] = group.get("weights") or {}
    activations: dict[str, Any] = group.get("input_activations") or {}
    strategy = activations.get("strategy", "token")
    as_written = activations.items() >= _ACTIVATIONS.get(strategy, {"strategy": None}).items()
    targets = group.get("targets")
    known = (
        config.get("quant_method") == METHOD
        and config.get("format") == FORMAT
        and weights.get("type") == "int"
        and weights.get("strategy") in ("channel", "group")
        and not weights.get("actorder")
        and (not activations or as_written)
        and isinstance(targets, list)
        and len(targets) == 1
    )
    if not known:
        raise not_supported(config)
    return str(group["targets"][0]), Scheme(
        num_bits=weights["num_bits"],
        group_size=weights["group_size"] if weights["strategy"] == "group" else None,
        symmetric=weights["symmetric"],
        activation_bits=activations.get("num_bits"),
        activation_strategy=strategy,
    )


def faults_of(config: dict[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    """Problems of the quantized layers of a checkpoint, one line each: missing parts, wrong shapes, an invalid quantization_config.

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
    infos = checkpoint.infos
    for name in infos:
        layer, _, part = name.rpartition(".")
        if part != PACKED:
            continue
        scheme = schemes.of(layer)
        missing = sorted(other for other in parts_of(scheme) if f"{layer}.{other}" not in infos)
        if missing:
            yield f"{layer}: {', '.join(missing)} missing. Download or copy the model again."
            continue
        if infos[f"{layer}.{SHAPE}"].shape != (2,):
            yield f"{layer}: {SHAPE} is not two numbers."
            continue
        rows, columns = checkpoint.read(f"{layer}.{SHAPE}", device=torch.device("cpu")).tolist()
        for other, shape in shapes_of(scheme, rows, columns).items():
            found = infos[f"{layer}.{other}"].shape
            if found != shape:
                yield f"{layer}: {other} has shape {list(found)}, but {scheme.num_bits} bits of {[rows, columns]} need {list(shape)}."


def shapes_of(scheme: Scheme, rows: int, columns: int) -> dict[str, tuple[int, int]]:
    """Shapes of the stored parts of a weight [rows, columns], by the last part of their name."""
    groups = 1 if scheme.group_size is None else columns // scheme.group_size
    shapes = {PACKED: (rows, _words(columns, scheme)), SCALE: (rows, groups)}
    return shapes if scheme.symmetric else {**shapes, ZERO_POINT: (_words(rows, scheme), groups)}


def _words(codes: int, scheme: Scheme) -> int:
    return -(-codes * scheme.num_bits // _WORD)


def not_supported(config: object, place: str | None = None) -> UsageError:
    """The error for a quantization_config that is not supported, with its `quant_method` and the place where it stands."""
    problem = f"the model is already quantized ({quant_method_of(config)}) in a form that is not supported"
    remedy = "Give the original model, or a result of cbqstream quantize."
    return UsageError(f"{'' if place is None else f'{place}: '}{problem}. {remedy}")
