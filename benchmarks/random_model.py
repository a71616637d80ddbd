#!/usr/bin/env python3
"""Write a Llama-shaped checkpoint of random bf16 weights with one shard per block.

Usage: random_model.py FOLDER --hidden D --blocks N [--inner I] [--experts E] [--heads H] [--key-value-heads H] [--vocabulary V]
                       [--real N]

With --experts a block is a block of Qwen3-MoE, 8 of its experts compute a token, and I is the width of an expert. With --real only the
first N blocks have weights; the others are zeros in sparse files that take no disk space. Prints the size of the weights in bytes. Scripts
that measure memory run this one as a separate process, because the peak memory of a child process starts at the memory of its parent.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from measure import run

HEAD_DIM, CHOSEN = 128, 8


def ensure_checkpoint(folder: Path, **sizes: int) -> int:
    """Write a checkpoint in a separate process, if it does not exist.

    Args:
        folder: folder of the checkpoint.
        sizes: flags of this script, with _ instead of -.

    Returns:
        Size of the weights in bytes.
    """
    done = folder / "model.safetensors.index.json"
    if not done.exists():
        flags = [part for name, value in sizes.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        run(sys.executable, __file__, str(folder), *flags)
    return int(json.loads(done.read_text())["metadata"]["total_size"])


def random_tokens(path: Path, vocabulary: int, number: int) -> Path:
    """Write `number` random token ids below `vocabulary` to `path`, and return `path`."""
    np.save(path, np.random.default_rng(0).integers(0, vocabulary, number))
    return path


def block_shapes(hidden: int, inner: int, query: int, key_value: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a block, by its name in the block.

    Args:
        hidden: hidden size.
        inner: width of the feed-forward layer, or of an expert.
        query: number of outputs of the query projection.
        key_value: number of outputs of the key and value projections.
        experts: number of experts; 0 is a dense block.
    """
    matrices = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
    }
    for owner in [f"mlp.experts.{index}" for index in range(experts)] or ["mlp"]:
        matrices |= {
            f"{owner}.gate_proj": (inner, hidden),
            f"{owner}.up_proj": (inner, hidden),
            f"{owner}.down_proj": (hidden, inner),
        }
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    if experts:
        matrices["mlp.gate"] = (experts, hidden)
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (HEAD_DIM,))
    return {f"{name}.weight": shape for name, shape in {**matrices, **norms}.items()}


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a shard of bf16 zeros as a sparse file."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_checkpoint(folder: Path, args: argparse.Namespace) -> int:
    """Write the checkpoint, and return the size of its weights in bytes."""
    import torch  # imported here so that scripts which only start this one as a process stay small
    from safetensors.torch import save_file

    hidden, inner = args.hidden, args.inner or args.hidden * 11 // 4
    heads = args.heads or hidden // HEAD_DIM
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": inner}
    if args.experts:
        chosen = {"num_experts": args.experts, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": inner}
        kind = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": HEAD_DIM, **chosen}
    config = {
        **kind,
        "hidden_size": hidden,
        "num_hidden_layers": args.blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": args.key_value_heads or heads,
        "vocab_size": args.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(torch.bfloat16)

    shapes = block_shapes(hidden, inner, heads * HEAD_DIM, config["num_key_value_heads"] * HEAD_DIM, args.experts)
    block = {name: values(shape) for name, shape in shapes.items()}
    matrix = (args.vocabulary, hidden)
    outer = {
        "model.embed_tokens.weight": values(matrix),
        "model.norm.weight": values((hidden,)),
        "lm_head.weight": values(matrix),
    }
    save_file(outer, folder / "outer.safetensors")
    weight_map = dict.fromkeys(outer, "outer.safetensors")
    real = args.blocks if args.real is None else args.real
    for index in range(args.blocks):
        shard, prefix = f"block-{index}.safetensors", f"model.layers.{index}."
        if index < real:
            save_file({f"{prefix}{name}": value for name, value in block.items()}, folder / shard)
        else:
            write_zeros(folder / shard, {f"{prefix}{name}": shape for name, shape in shapes.items()})
        weight_map |= {f"{prefix}{name}": shard for name in shapes}
    size = sum(value.nbytes for value in outer.values()) + args.blocks * sum(value.nbytes for value in block.values())
    index_file = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--hidden", type=int, required=True, help="hidden size")
    parser.add_argument("--blocks", type=int, required=True, help="number of blocks")
    parser.add_argument(
        "--inner", type=int, help="width of the feed-forward layer or of an expert; 11/4 of the hidden size"
    )
    parser.add_argument("--experts", type=int, default=0, help="experts per block; 0 writes dense blocks")
    parser.add_argument(
        "--heads", type=int, help="attention heads of 128 channels; by default they add up to the hidden size"
    )
    parser.add_argument(
        "--key-value-heads", type=int, help="key and value heads; as many as attention heads by default"
    )
    parser.add_argument("--vocabulary", type=int, default=1024, help="vocabulary size")
    parser.add_argument("--real", type=int, help="number of blocks with random weights; all by default")
    args = parser.parse_args()
    print(write_checkpoint(args.folder, args))


if __name__ == "__main__":
    main()
