"""The format `pack-quantized` of compressed-tensors: names, bit layout (theirs) and the quantization_config of config.json.

A linear layer `NAME` is stored as

    NAME.weight_packed      int32 [O, ceil(I * num_bits / 32)]           codes + 2^(num_bits - 1), dense along the row
    NAME.weight_scale       dtype of the original weight [O, G]
    NAME.weight_zero_point  int32 [ceil(O * num_bits / 32), G]           if asymmetric; packed along dim 0
    NAME.weight_shape       int64 [2]
    NAME.input_scale        dtype of the original weight [1]             if inputs have one step size
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from cbqstream.checkpoint.folder import method_of
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import UsageError, shown
from cbqstream.models.families import JOINED
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import ActivationStrategy, LayerSchemes, Scheme

PACKED, SCALE, ZERO_POINT, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
INPUT_SCALE = "input_scale"
_WORD = 32
_SLAB_ROWS = 128 * _WORD  # zero points of whole slabs fill whole words
METHOD, FORMAT = "compressed-tensors", "pack-quantized"
_ACTIVATIONS: dict[ActivationStrategy, dict[str, Any]] = {
    "token": {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "tensor": {"type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
}


def parts_of(scheme: Scheme) -> tuple[str, ...]:
    """What a weight is decoded from."""
    return (PACKED, SCALE, SHAPE) if scheme.symmetric else (PACKED, SCALE, SHAPE, ZERO_POINT)


def encode(weight: QuantizedWeight, *, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored tensors of one weight, on the CPU, by the last part of their name."""
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
    """What `encode` gives, some rows at a time: packing a head of a billion weights at once would take many times its size."""
    slabs = [
        encode(weight.rows(slice(start, start + _SLAB_ROWS)), scale_dtype=scale_dtype)
        for start in range(0, weight.codes.shape[0], _SLAB_ROWS)
    ]
    rows = {part: torch.cat([slab[part] for slab in slabs]) for part in slabs[0] if part not in (SHAPE, INPUT_SCALE)}
    return {**slabs[0], **rows, SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64)}


def decode(tensors: dict[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `encode`."""
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
    """What config.json says of the quantization; only keys that compressed-tensors 0.17 knows.

    Args:
        schemes: of the layers. Where several groups have a layer as a target, a regular expression goes before `Linear` for who reads it.
        not_quantized: module paths, or regular expressions of them after `re:`.
    """
    # of layers that it computes as one, vLLM looks for its own name, then for `Linear`, and for the parts only then
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
    """The schemes that a quantization_config of `quantization_config` describes.

    Raises:
        UsageError: it is of another method, or of a form that is not written here.
    """
    try:
        found = [_read_group(config, group) for group in config["config_groups"].values()]
    except (AttributeError, LookupError, TypeError) as error:
        raise _not_read_here(config) from error
    default = [scheme for target, scheme in found if target == "Linear"]
    others = tuple(
        (target[3:-1], scheme) for target, scheme in found if target.startswith("re:") and target.endswith("$")
    )
    if len(default) != 1 or len(others) != len(found) - 1:
        raise _not_read_here(config)
    return LayerSchemes(default[0], others)


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
        raise _not_read_here(config)
    return str(group["targets"][0]), Scheme(
        num_bits=weights["num_bits"],
        group_size=weights["group_size"] if weights["strategy"] == "group" else None,
        symmetric=weights["symmetric"],
        activation_bits=activations.get("num_bits"),
        activation_strategy=strategy,
    )


def faults_of(config: dict[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    """What is wrong with the quantized layers of a checkpoint: parts that are missing or of another shape, and a config that is not read.

    Args:
        config: the quantization_config.
        checkpoint: of which only the shapes of weights are read.
    """
    try:
        QuantizationConfig.model_validate(config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        yield f"quantization_config is not read by compressed-tensors: {shown(str(error).splitlines()[0])}."
    schemes = schemes_of(config)
    infos = checkpoint.infos
    for name in infos:
        layer, _, part = name.rpartition(".")
        if part != PACKED:
            continue
        scheme = schemes.of(layer)
        missing = sorted(other for other in parts_of(scheme) if f"{layer}.{other}" not in infos)
        if missing:
            yield f"{layer}: {', '.join(missing)} missing."
            continue
        if infos[f"{layer}.{SHAPE}"].shape != (2,):
            yield f"{layer}: {SHAPE} is not two numbers."
            continue
        rows, columns = checkpoint.read(f"{layer}.{SHAPE}", device=torch.device("cpu")).tolist()
        for other, shape in shapes_of(scheme, rows, columns).items():
            found = infos[f"{layer}.{other}"].shape
            if found != shape:
                yield f"{layer}: {other} is {list(found)}, {list(shape)} belong to {scheme.num_bits} bits of {[rows, columns]}."


def shapes_of(scheme: Scheme, rows: int, columns: int) -> dict[str, tuple[int, int]]:
    """Of the parts of a weight [rows, columns]."""
    groups = 1 if scheme.group_size is None else columns // scheme.group_size
    shapes = {PACKED: (rows, _words(columns, scheme)), SCALE: (rows, groups)}
    return shapes if scheme.symmetric else {**shapes, ZERO_POINT: (_words(rows, scheme), groups)}


def _words(codes: int, scheme: Scheme) -> int:
    return -(-codes * scheme.num_bits // _WORD)


def _not_read_here(config: object) -> UsageError:
    return UsageError(f"the model is already quantized ({method_of(config)}) in a form that is not read here.")
