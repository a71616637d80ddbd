"""Weights of compressed-tensors, which decodes them itself.

    format                NAME.weight_packed or NAME.weight    NAME.weight_scale      others
    pack-quantized        I32 [O, ceil(I b / 32)]              float                  weight_shape [2], weight_zero_point, weight_g_idx [I]
    int-quantized         I8 [O, I]                            float                  weight_zero_point
    float-quantized       F8_E4M3 [O, I]                       float
    naive-quantized       as int-quantized or float-quantized
    mxfp8-quantized       F8_E4M3 [O, I]                       U8 [O, I / 32]
    mxfp4-pack-quantized  U8 [O, I / 2]                        U8 [O, I / 32]
    nvfp4-pack-quantized  U8 [O, I / 2]                        F8_E4M3 [O, I / 16]    weight_global_scale [1]

Scales are [] or [1] for a tensor, [O, 1] for channels, [O, G] for groups, and [ceil(O / a), ceil(I / b)] for blocks of a rows and b
columns. Layers may have different formats (`mixed-precision`). `weight_g_idx`, which compressed-tensors no longer reads, has the group of
each column.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.utils.match import match_name
from torch import Tensor, nn

from cbqstream.checkpoint.decoders.decoder import (
    REPAIR,
    Decoder,
    MakeWeight,
    Parts,
    Quantized,
    by_rows,
    float8,
    not_read,
    require_form,
    require_part,
    require_scales,
)
from cbqstream.checkpoint.tensors import DerivedTensor
from cbqstream.errors import InputError, shown

_WORD = 32
_MOST_BITS = 8
_FLOATS = ("F32", "F16", "BF16")
_STORED = {
    "codes": ("weight", "weight_packed"),
    "scale": ("weight_scale",),
    "zero": ("weight_zero_point",),
    "shape": ("weight_shape",),
    "whole": ("weight_global_scale",),
    "g_idx": ("weight_g_idx",),
}
"""Names in compressed-tensors of each part."""


@dataclass(frozen=True, slots=True)
class _Format:
    """Form of the weights of a format."""

    codes: tuple[str, ...]
    """Dtypes of the codes."""
    scales: tuple[str, ...] = _FLOATS
    """Dtypes of the scales."""
    per_byte: int = 1
    """Number of codes in a stored value; 0 if they are packed into words of 32 bits."""

    @property
    def name(self) -> str:
        """Name in compressed-tensors of the part with the codes."""
        return _STORED["codes"][self.per_byte != 1]


_FORMATS = {
    "pack-quantized": _Format(("I32",), per_byte=0),
    "int-quantized": _Format(("I8",)),
    "float-quantized": _Format(("F8_E4M3",)),
    "naive-quantized": _Format(("I8", "F8_E4M3")),
    "mxfp8-quantized": _Format(("F8_E4M3",), ("U8",)),
    "mxfp4-pack-quantized": _Format(("U8",), ("U8",), per_byte=2),
    "nvfp4-pack-quantized": _Format(("U8",), ("F8_E4M3",), per_byte=2),
}
_BY_GROUP = ("group", "tensor_group")


@dataclass(frozen=True, slots=True)
class _Scheme:
    """Scheme of some layers."""

    scheme: QuantizationScheme
    format: str

    @property
    def args(self) -> Any:
        """The scheme of the weights."""
        return self.scheme.weights

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a block; None if the scales are not those of blocks."""
        return tuple(self.args.block_structure) if self.args.strategy == "block" else None


def _open(quantized: Quantized) -> MakeWeight:
    config = quantized.config
    for key in ("sparsity_config", "transform_config"):
        held = config.get(key)
        if held and not (isinstance(held, dict) and held.get("format") == "dense") and held != {"config_groups": {}}:
            raise not_read(quantized, f"its {key} describes another change of the weights, which is not read")
    return partial(_weight, quantized, _schemes(quantized))


def _schemes(quantized: Quantized) -> list[_Scheme]:
    """The schemes of the model.

    Raises:
        InputError: the quantization_config is not complete, or a format is not read.
    """
    config = deepcopy(dict(quantized.config))
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise not_read(quantized, "its quantization_config has no config_groups")
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):  # compressed-tensors refuses orders that need `weight_g_idx`
            weights.pop("actorder", None)
    try:
        read = QuantizationConfig.model_validate(config)
        schemes = [scheme for scheme in read.config_groups.values() if scheme.weights is not None]
        named = [scheme.format or read.format for scheme in schemes]
        found = [
            _Scheme(scheme, name if name in _FORMATS else str(infer_module_format(nn.Linear, scheme).value))
            if name == "mixed-precision"
            else _Scheme(scheme, str(name))
            for scheme, name in zip(schemes, named, strict=True)
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = shown(str(error).splitlines()[0])
        raise not_read(quantized, f"compressed-tensors cannot read its quantization_config ({reason})") from error
    for one in found:
        if not 1 <= one.args.num_bits <= _MOST_BITS:
            raise not_read(quantized, f"its num_bits, {one.args.num_bits}, are not 1 to {_MOST_BITS}")
        if one.format not in _FORMATS or one.args.strategy not in ("tensor", "channel", "block", *_BY_GROUP):
            raise not_read(
                quantized, f"its format {one.format} ({one.args.strategy}) is not one of {', '.join(_FORMATS)}"
            )
    return found


def _scheme_of(layer: str, schemes: list[_Scheme]) -> _Scheme | None:
    """Scheme of a layer: the one that names it, else the one whose pattern matches, else that of all linear layers."""
    by_name = [one for one in schemes if layer in one.scheme.targets]
    by_pattern = [one for one in schemes if any(match_name(layer, target) for target in one.scheme.targets)]
    by_class = [one for one in schemes if "Linear" in one.scheme.targets]
    alone = schemes if len(schemes) == 1 else []
    return next(iter([*by_name, *by_pattern, *by_class, *alone]), None)


def _weight(quantized: Quantized, schemes: list[_Scheme], name: str, parts: Parts) -> DerivedTensor:
    codes = parts["codes"]
    found = _scheme_of(name.removesuffix(".weight"), schemes)
    if found is None:
        problem = "has codes, but no group of the quantization_config names its layer"
        raise InputError(codes.file, f"{problem}. {REPAIR}", tensor=name)
    form, args = _FORMATS[found.format], found.args
    if not codes.name.endswith(form.name) or len(codes.shape) != 2:
        problem = f"has shape {list(codes.shape)}, but {found.format} stores {form.name} in two dimensions"
        raise InputError(codes.file, f"{problem}. {REPAIR}", tensor=codes.name)
    scale = require_part(name, parts, "scale", "codes", "weight_scale")
    rows, stored = codes.shape
    if form.per_byte:
        columns = stored * form.per_byte
    elif args.strategy in _BY_GROUP:
        columns = scale.shape[-1] * args.group_size if scale.shape else 0
    else:
        columns = stored * _WORD // args.num_bits
    packed = columns // form.per_byte if form.per_byte else -(-columns * args.num_bits // _WORD)
    require_form(codes, ((rows, packed),), form.codes)
    require_form(scale, _scale_shapes(found, rows, columns), form.scales)
    kept = {"codes": float8(codes), "scale": float8(scale)}
    if not form.per_byte:
        kept["shape"] = require_part(name, parts, "shape", "codes", "weight_shape")
        require_form(kept["shape"], ((2,),), ("I64", "I32"))
    if not args.symmetric:
        kept["zero"] = require_part(name, parts, "zero", "codes", "weight_zero_point")
        in_words = (-(-rows * args.num_bits // _WORD), *scale.shape[1:])
        is_packed = not form.per_byte and args.strategy in ("group", "channel")
        require_form(kept["zero"], (in_words if is_packed else scale.shape,), ("I32",) if is_packed else ("I8",))
    if args.strategy == "tensor_group":
        kept["whole"] = require_part(name, parts, "whole", "codes", "weight_global_scale")
        require_form(kept["whole"], ((1,),), ("F32",))
    if "g_idx" in parts and not form.per_byte and args.strategy == "group":
        kept["g_idx"] = parts["g_idx"]
        require_form(kept["g_idx"], ((columns,),), ("I32", "I64"))
    return DerivedTensor(name, quantized.dtype, (rows, columns), kept, partial(_decoded, found, quantized.dtype))


def _scale_shapes(found: _Scheme, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Possible shapes of the scales of a weight."""
    args, block = found.args, found.block
    if block is not None:
        return ((-(-rows // block[0]), -(-columns // block[1])),)
    if args.strategy in _BY_GROUP:
        return ((rows, columns // args.group_size),) if columns % args.group_size == 0 else ()
    return ((rows, 1),) if args.strategy == "channel" else ((1,), ())


def _decoded(found: _Scheme, dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight [O, I]."""
    args, form, codes = found.args, _FORMATS[found.format], parts["codes"]
    _check_values(found, parts)
    rows, columns = codes.shape[0], codes.shape[1] * form.per_byte
    if not form.per_byte:
        held = [int(size) for size in parts["shape"]]
        groups = parts["scale"].shape[-1] * args.group_size if args.strategy in _BY_GROUP else None
        columns = groups or codes.shape[1] * _WORD // args.num_bits
        if held != [rows, columns]:
            raise ValueError(f"weight_shape is {held}, but the codes are those of {[rows, columns]}")
    compressor: Any = BaseCompressor.get_value_from_registry(found.format)
    order = _order(parts["g_idx"], args.group_size) if "g_idx" in parts else None

    def rows_of(slab: slice) -> Tensor:
        held = {_STORED[part][-1]: _rows(found, part, parts[part], slab) for part in parts if part != "g_idx"}
        if form.per_byte == 1:
            held["weight"] = held.pop("weight_packed")
        if "weight_shape" in held:
            held["weight_shape"] = torch.tensor([slab.stop - slab.start, columns])
        if order is not None:
            return _ordered(found, held, order)
        made: Tensor = compressor.decompress(held, found.scheme)["weight"]
        return made

    step = _WORD if found.block is None else found.block[0]  # zero points of 32 rows fill whole words
    return by_rows((rows, columns), dtype, step, rows_of)


def _rows(found: _Scheme, part: str, values: Tensor, slab: slice) -> Tensor:
    """The values of a part for a slab of rows."""
    if part in ("shape", "whole") or (part in ("scale", "zero") and found.args.strategy == "tensor"):
        return values
    if part in ("scale", "zero") and found.block is not None:
        return values[slab.start // found.block[0] : -(-slab.stop // found.block[0])]
    if part == "zero" and values.dtype == torch.int32:
        bits = found.args.num_bits
        return values[slab.start * bits // _WORD : -(-slab.stop * bits // _WORD)]
    return values[slab]


def _check_values(found: _Scheme, parts: Mapping[str, Tensor]) -> None:
    """Check scales and codes.

    Raises:
        ValueError: they have values that no program writes.
    """
    scale, codes, args = parts["scale"], parts["codes"], found.args
    if scale.dtype == torch.uint8:
        if (scale == 255).any():
            raise ValueError("a scale is the byte 255, which is not a number")
    else:
        # in FP8, a scale may be too small for its dtype; with integers, a negative scale puts the longer side of the codes elsewhere
        require_scales(scale.float(), zero=args.type == "float", negative=args.type == "int" and args.symmetric)
    if "whole" in parts:
        require_scales(parts["whole"], what="weight_global_scale")
    if codes.dtype == torch.int8 and args.num_bits < _MOST_BITS:
        low, high = (int(value) for value in torch.aminmax(codes))
        most = 1 << (args.num_bits - 1)
        if low < -most or high >= most:
            raise ValueError(f"codes are from {low} to {high}, but {args.num_bits} bits hold {-most} to {most - 1}")


def _order(group_I: Tensor, group_size: int) -> Tensor | None:
    """The columns in the order of their groups; None if they are in that order.

    Raises:
        ValueError: a group does not have `group_size` columns.
    """
    if (group_I == -1).all():
        return None
    counts = torch.bincount(group_I.long()) if int(group_I.min()) >= 0 else torch.zeros(1)
    if len(counts) != len(group_I) // group_size or not (counts == group_size).all():
        raise ValueError(
            f"weight_g_idx does not have {group_size} columns in each of {len(group_I) // group_size} groups"
        )
    return torch.argsort(group_I, stable=True)


def _ordered(found: _Scheme, held: Mapping[str, Tensor], order_I: Tensor) -> Tensor:
    """Rows of a weight of `pack-quantized` whose groups are not columns beside each other."""
    bits, scale = found.args.num_bits, held["weight_scale"]
    codes = unpack_from_int32(held["weight_packed"], bits, torch.Size(held["weight_shape"].tolist()))
    zero = held.get("weight_zero_point")
    if zero is not None:
        zero = unpack_from_int32(zero, bits, torch.Size((len(codes), scale.shape[-1])), packed_dim=0)
    made = torch.empty(codes.shape, dtype=scale.dtype)
    made[:, order_I] = dequantize(codes[:, order_I], scale, zero, found.args)
    return made


COMPRESSED = Decoder(
    codes="codes",
    ends={
        "_packed": ("", "codes"),
        "_global_scale": ("", "whole"),
        "_scale": ("", "scale"),
        "_zero_point": ("", "zero"),
        "_shape": ("", "shape"),
        "_g_idx": ("", "g_idx"),
    },
    open=_open,
    in_place=("I8", "F8_E4M3"),
)
"""Weights of `compressed-tensors`."""
