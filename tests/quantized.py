"""Tiny models whose linear layers are stored quantized, as other programs store them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor

from cbqstream.packed.exports import pack_words

Parts = dict[str, Tensor]
"""Stored tensors of a layer, by the last part of their names."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def scheme_of(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=weights)


def compressed(weight: Tensor, format_name: str, **weights: Any) -> Parts:
    """A weight that compressed-tensors quantized and compressed; scales are in the dtype of the weight."""
    scheme = scheme_of(**weights)
    args, (rows, columns) = scheme.weights, weight.shape
    if args.strategy in ("group", "tensor_group"):
        grouped = weight.reshape(rows, -1, args.group_size)
    elif args.strategy == "block":
        high, wide = args.block_structure
        padded = torch.zeros(-(-rows // high) * high, -(-columns // wide) * wide, dtype=weight.dtype)
        padded[:rows, :columns] = weight
        grouped = padded.reshape(-(-rows // high), high, -1, wide).transpose(1, 2).flatten(2)
    else:
        grouped = weight[:, None] if args.strategy == "channel" else weight.reshape(1, 1, -1)
    whole = {}
    if args.strategy == "tensor_group":
        whole = {"weight_global_scale": generate_gparam(weight.float().min(), weight.float().max()).reshape(1)}
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = calculate_qparams(low, high, args, global_scale=whole.get("weight_global_scale"))
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(args.zp_dtype), **whole}
    return {
        name: value.contiguous()
        for name, value in BaseCompressor.get_value_from_registry(format_name).compress(state, scheme).items()
    }


def fp8(weight: Tensor, block: tuple[int, int], name: str = "weight_scale_inv") -> Parts:
    """A weight in FP8 with a float32 scale for every block."""
    (rows, columns), (high, wide) = weight.shape, block
    padded = torch.zeros(-(-rows // high) * high, -(-columns // wide) * wide)
    padded[:rows, :columns] = weight.float()
    blocks = padded.reshape(-(-rows // high), high, -1, wide)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return {"weight": codes.contiguous().to(torch.float8_e4m3fn), name: scale}


def modelopt_nvfp4(weight: Tensor) -> Parts:
    """A weight in NVFP4 with the names and scales of ModelOpt."""
    made = compressed(weight, "nvfp4-pack-quantized", **NVFP4["weights"].model_dump(exclude_none=True))
    return {
        "weight": made["weight_packed"],
        "weight_scale": made["weight_scale"],
        "weight_scale_2": (1 / made["weight_global_scale"]).reshape(()),
        "input_scale": torch.tensor(0.5),
    }


def integers(weight: Tensor, bits: int, groups: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [O, I], float16 scales [O, G] and unsigned zero points [O, G] of a weight."""
    grouped = weight.float().reshape(len(weight), groups, -1)
    most = (1 << bits) - 1
    if symmetric:
        scale = (grouped.abs().amax(-1) / (most // 2)).half()
        zero = torch.full(scale.shape, (most + 1) // 2)
    else:
        scale = ((grouped.amax(-1) - grouped.amin(-1)) / most).half()
        zero = (-grouped.amin(-1) / scale.float()).round().clamp(0, most).long()
    codes = (grouped / scale.float()[..., None]).round() + zero[..., None]
    return codes.clamp(0, most).long().reshape(weight.shape), scale, zero


def dense_words(values: Tensor, bits: int) -> Tensor:
    """Words of unsigned codes [..., N] without gaps, int32 [..., N b / 32]."""
    shifts = torch.arange(bits)
    spread = ((values[..., None] >> shifts) & 1).reshape(*values.shape[:-1], -1, 32)
    words = (spread << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(
    weight: Tensor, bits: int = 4, groups: int = 2, *, symmetric: bool = True, offset: int = 1, shuffled: bool = False
) -> Parts:
    """A weight of GPTQ; `shuffled` assigns its columns to groups at random, as `desc_act` does."""
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.manual_seed(0)) if shuffled else torch.arange(columns)
    codes, scale, zero = integers(weight[:, order], bits, groups, symmetric=symmetric)
    codes = codes[:, torch.argsort(order)]
    g_idx = (torch.argsort(order) // (columns // groups)).int()
    qzeros = dense_words(((zero - offset if bits == 3 else zero) % (1 << bits)).T, bits)
    ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
    return {
        "qweight": dense_words(codes, bits).T.contiguous(),
        "qzeros": qzeros - offset * ones.get(bits, 0),  # with borrows, as GPTQModel stores it
        "scales": scale.T.contiguous(),
        "g_idx": g_idx,
    }


def awq(weight: Tensor, groups: int = 2, *, zero_point: bool = True) -> Parts:
    codes, scale, zero = integers(weight, 4, groups, symmetric=not zero_point)
    made = {"qweight": pack_words(codes.T, 4, AWQ_ORDER), "scales": scale.T.contiguous()}
    return {**made, "qzeros": pack_words(zero.T, 4, AWQ_ORDER)} if zero_point else made


def store(folder: Path, encode: Callable[[Tensor], Parts], quantization_config: dict[str, Any]) -> Path:
    """Quantize the linear layers of the blocks of a dense model folder in place, and return the folder."""
    for shard in folder.glob("*.safetensors"):
        tensors: Parts = {}
        for name, value in load_file(shard).items():
            layer = re.fullmatch(r"(.*\.\d+\..*_proj)\.weight", name)
            parts = {"weight": value} if layer is None else encode(value)
            prefix = name.removesuffix(".weight") if layer is None else layer[1]
            if layer is None:
                tensors[name] = value
            else:
                tensors |= {f"{prefix}.{part}": held for part, held in parts.items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        held = {name: shard.name for shard in folder.glob("*.safetensors") for name in load_file(shard)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": held}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
    return folder
