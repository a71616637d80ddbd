#!/usr/bin/env python3
"""Unpack every layer of a gptq or awq export with the code of auto-round, and compare it with the dense export of the same result.

Usage: PYTHON_OF_AUTOROUND peer_unpack.py EXPORT DENSE

auto-round computes `(u - z) * s`, which must round to exactly the bf16 weights of the dense export. The script does not import cbqstream.
The exit code is 1 if a layer differs.
"""

import json
import sys
from pathlib import Path

import torch
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, by name."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def through_layer(parts: dict[str, torch.Tensor], bits: int, size: int, kind: type) -> torch.Tensor:
    """Weight [O, I] of a layer of auto-round, computed as its output for the unit vectors.

    Args:
        parts: tensors of the layer, by name.
        bits: width of the weights.
        size: group size.
        kind: class of the layer.
    """
    inputs, outputs = parts["qweight"].shape[0] * 32 // bits, parts["qweight"].shape[1]
    layer = kind(bits, size, inputs, outputs, bias=False)
    layer.load_state_dict(parts, strict=False)
    layer.scales = layer.scales.float()
    return layer(torch.eye(inputs)).T


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, dense = Path(sys.argv[1]), tensors_of(Path(sys.argv[2]))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits, size = config["bits"], config["group_size"]
    tensors = tensors_of(folder)
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    same = 0
    for layer in layers:
        parts = {part: tensors[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales")}
        if config["quant_method"] == "awq":
            found = dequantize_gemm(
                *(parts[part] for part in ("qweight", "qzeros")), parts["scales"].float(), bits, size
            ).T
        else:
            parts["g_idx"] = tensors[f"{layer}.g_idx"]
            kind = qlinear_torch_zp if config["checkpoint_format"] == "gptq" else qlinear_torch
            found = through_layer(parts, bits, size, kind.QuantLinear)
        same += torch.equal(found.to(torch.bfloat16), dense[f"{layer}.weight"])
    print(f"{folder.name}: {same} of {len(layers)} layers are bit for bit equal to those of {Path(sys.argv[2]).name}")
    sys.exit(same != len(layers) or not layers)


if __name__ == "__main__":
    main()
