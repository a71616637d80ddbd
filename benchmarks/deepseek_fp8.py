#!/usr/bin/env python3
"""Plan a checkpoint with the shapes of DeepSeek V3 in FP8, quantize its first window, and decode its first block with experts, on the CPU.

Usage: deepseek_fp8.py WORK [--max-ram 16GiB] [--threads 2] [--results FILE] [--keep]

61 blocks of 256 experts, 671 billion weights, FP8 in blocks of 128 x 128 with float32 scales, as published. The embeddings, the first three
blocks, which are dense, and if 16 GiB of disk are free the first block with experts have random values; everything else is holes in sparse
files. One window (blocks 0 and 1) is quantized to W4A16 by rounding to nearest, without a search for scales, with 8 segments of 64 tokens.
The files are deleted then.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import cbqstream, run, save
from random_model import random_tokens

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
BLOCK = 128
HIDDEN, VOCABULARY, BLOCKS, DENSE, EXPERTS = 7168, 129280, 61, 3, 256
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": BLOCKS,
    "first_k_dense_replace": DENSE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
ROOM = 16 * GIB
"""Free disk space with which the block of experts is written too."""
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of tensors, by name."""


def block_tensors(index: int, *, dense: int = DENSE, experts: int = EXPERTS, fp8: bool = True) -> Tensors:
    """The tensors of a block, by default as published.

    Args:
        index: number of the block.
        dense: number of blocks at the start that have no experts.
        experts: number of experts.
        fp8: whether the linear layers are FP8 with scales; otherwise they are bf16.
    """
    attention = {
        "q_a_proj": (1536, HIDDEN),
        "q_b_proj": (128 * 192, 1536),
        "kv_a_proj_with_mqa": (576, HIDDEN),
        "kv_b_proj": (128 * 256, 512),
        "o_proj": (HIDDEN, 128 * 128),
    }
    layers = {f"self_attn.{name}": shape for name, shape in attention.items()}
    widths = {"mlp": 18432}
    if index >= dense:
        widths = {"mlp.shared_experts": 2048} | {f"mlp.experts.{number}": 2048 for number in range(experts)}
    for owner, inner in widths.items():
        layers |= {f"{owner}.{name}": (inner, HIDDEN) for name in ("gate_proj", "up_proj")}
        layers[f"{owner}.down_proj"] = (HIDDEN, inner)
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    prefix = f"model.layers.{index}."
    tensors: Tensors = {f"{prefix}{name}.weight": ("BF16", (size,)) for name, size in norms.items()}
    if index >= dense:
        tensors[f"{prefix}mlp.gate.weight"] = ("BF16", (experts, HIDDEN))
        tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
    for name, (rows, columns) in layers.items():
        tensors[f"{prefix}{name}.weight"] = ("F8_E4M3" if fp8 else "BF16", (rows, columns))
        if fp8:
            tensors[f"{prefix}{name}.weight_scale_inv"] = ("F32", (-(-rows // BLOCK), -(-columns // BLOCK)))
    return tensors


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor in bytes."""
    return BYTES[dtype] * int(np.prod(shape))


def random_bytes(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """Values of a tensor: norms are 1, scales make weights of ordinary size, and all codes are finite."""
    if dtype == "F8_E4M3":
        codes = rng.integers(0, 256, size_of(dtype, shape), dtype=np.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # not a number
        return codes.tobytes()
    if dtype == "F32":
        return np.full(shape, 1e-4, dtype=np.float32).tobytes()
    values = np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write_shard(path: Path, tensors: Tensors, *, real: bool) -> int:
    """Write a shard with random values, or with holes, unless it is there. Return the size of its values in bytes."""
    header: dict[str, Any] = {}
    end, rng = 0, np.random.default_rng(0)
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + size_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    if path.exists() and path.stat().st_size == 8 + len(text) + end:
        return end
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, shape in tensors.values() if real else ():
            file.write(random_bytes(dtype, shape, rng))
        file.truncate(8 + len(text) + end)
    return end


def write_checkpoint(folder: Path, real: int) -> tuple[int, list[int]]:
    """Write the checkpoint, in which `real` blocks are real, and return the sizes of the embeddings and of each block in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    matrix = ("BF16", (VOCABULARY, HIDDEN))
    shards = {
        "embedding": {"model.embed_tokens.weight": matrix},
        "head": {"model.norm.weight": ("BF16", (HIDDEN,)), "lm_head.weight": matrix},
    }
    shards |= {f"block-{index}": block_tensors(index) for index in range(BLOCKS)}
    filled = {"embedding", *(f"block-{index}" for index in range(real))}
    sizes = {
        name: write_shard(folder / f"{name}.safetensors", tensors, real=name in filled)
        for name, tensors in shards.items()
    }
    weight_map = {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sizes["embedding"], [sizes[f"block-{index}"] for index in range(BLOCKS)]


def decode_block(folder: Path) -> None:
    """Read all tensors of the first block with experts, one after another, and print seconds, bytes of bf16 and the peak RSS as JSON."""
    import torch

    from cbqstream.evaluation.model import open_model

    torch.set_num_threads(1)
    _, source = open_model(folder)
    began, decoded = time.monotonic(), 0
    for name in source.infos:
        if name.startswith(f"model.layers.{DENSE}."):
            decoded += source.read(name, device=torch.device("cpu")).nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.monotonic() - began, "decoded": decoded, "peak_rss": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the checkpoint and the run")
    parser.add_argument("--max-ram", default="16GiB", help="memory limit of the run")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results" / "deepseek_fp8.json", help="JSON file for the row"
    )
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=int, metavar="REAL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder, out = args.work / "deepseek-v3-fp8", args.work / "out"
    if args.decode:
        decode_block(folder)
        return
    if args.write is not None:
        print(json.dumps(write_checkpoint(folder, args.write)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    real = DENSE + (shutil.disk_usage(args.work).free > ROOM)
    try:
        print_row(args, folder, out, real)
    finally:
        for path in () if args.keep else (folder, out, Path(f"{out}.run")):
            shutil.rmtree(path, ignore_errors=True)


def print_row(args: argparse.Namespace, folder: Path, out: Path, real: int) -> None:
    """Measure, store the row and print it."""
    # in a process of its own, because the peak memory of a child process starts at that of its parent
    written = run(sys.executable, __file__, str(args.work), "--write", str(real)).output
    embedding, blocks = json.loads(written)
    tokens = random_tokens(args.work / "tokens.npy", VOCABULARY, 8 * 64)
    lengths = ["--num-samples", "8", "--seq-len", "64", "--rounding", "nearest", "--init", "minmax"]
    common = [*lengths, "--device", "cpu", "--threads", str(args.threads), "--max-ram", args.max_ram]
    planned = cbqstream("plan", str(folder), "--json", "--without-time", *common)
    plan = json.loads(planned.output)
    stop = ["--stop-after-window", "1"]
    made = cbqstream("quantize", str(folder), str(out), "--dataset", str(tokens), *common, *stop, expect=75)
    row = {
        "max_ram": args.max_ram,
        "threads": args.threads,
        "cores": os.cpu_count(),
        "stored": embedding * 2 + 2 * HIDDEN + sum(blocks),
        "planned_stored": plan["source"],
        "planned_read": plan["bytes_read"],
        "plan_seconds": planned.seconds,
        "plan_peak_rss": planned.peak_rss,
        "planned_ram": plan["ram_total"],
        "peak_rss": made.peak_rss,
        "seconds": made.seconds,
    }
    if real > DENSE:
        decoded = json.loads(run(sys.executable, __file__, str(args.work), "--decode").output)
        row |= {f"decode_{name}": value for name, value in decoded.items()} | {"block": blocks[DENSE]}
    save(args.results, f"{args.max_ram}", row)
    stored, planned_ram = row["stored"], row["planned_ram"]
    print(
        f"checkpoint {stored / GIB:.1f} GiB as stored, by the plan {row['planned_stored'] / stored:.4f} times as much;"
        f" a whole run reads {row['planned_read'] / stored:.2f} times the checkpoint"
    )
    print(f"plan: {row['plan_seconds']:.0f} s, peak {row['plan_peak_rss'] / GIB:.2f} GiB")
    print(
        f"--max-ram {args.max_ram}: planned {planned_ram / GIB:.2f} GiB, measured {row['peak_rss'] / GIB:.2f} GiB in the first"
        f" window (dense blocks), {row['peak_rss'] / planned_ram:.2f} times the plan; {row['seconds']:.0f} s"
    )
    if real > DENSE:
        rate = row["block"] / row["decode_seconds"] / GIB
        print(
            f"a block of experts, {row['block'] / GIB:.1f} GiB: decoded tensor by tensor in {row['decode_seconds']:.0f} s"
            f" ({rate:.2f} GiB/s as stored, one thread), peak {row['decode_peak_rss'] / GIB:.2f} GiB"
        )


if __name__ == "__main__":
    main()
