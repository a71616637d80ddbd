#!/usr/bin/env python3
"""Peak resident memory does not grow with the number of blocks, and not with the number of samples.

Usage: memory.py WORK [--rows HIDDEN,BLOCKS,SAMPLES ...] [--results FILE]

Writes Llama-shaped checkpoints of random bf16 weights, one shard a block, and quantizes each in a process of its own: W4A16 group 64,
learned rounding from min-max scales, windows of two blocks without overlap (both save time, not memory), 64 random tokens a sample.
Prints peak resident memory beside the checkpoint's size.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from measure import cbqstream, run

HERE = Path(__file__).resolve().parent
VOCABULARY, SEQ_LEN = 1024, 64
ROWS = [(2048, 8, 4), (2048, 64, 4), (512, 4, 64), (512, 4, 512)]
"""Hidden size, blocks, samples; each two belong together."""


def write_checkpoint(folder: Path, blocks: int, hidden: int, vocabulary: int = VOCABULARY) -> int:
    """Write a random Llama checkpoint and return the size of its weights in bytes."""
    import torch
    from safetensors.torch import save_file

    inner = hidden * 11 // 4
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(torch.bfloat16)

    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    ends = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "lm_head.weight": matrix(vocabulary, hidden)}
    ends["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    shards = {"ends.safetensors": ends}
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    block = {f"{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    block |= {
        f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    weight_map, size = {}, 0
    for index in range(-1, blocks):
        name = f"block-{index}.safetensors" if index >= 0 else "ends.safetensors"
        tensors = (
            {f"model.layers.{index}.{local}": value for local, value in block.items()} if index >= 0 else shards[name]
        )
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(value.nbytes for value in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return size


def measure(work: Path, hidden: int, blocks: int, samples: int) -> dict:
    """Quantize a checkpoint of `blocks` blocks."""
    folder, out, tokens = work / f"model-{blocks}", work / f"out-{blocks}", work / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, VOCABULARY, samples * SEQ_LEN))
    # In a process of its own: a child's peak starts at what its parent holds when it is spawned.
    written = run(sys.executable, __file__, str(folder), "--write", str(hidden), str(blocks))
    size = int(written.output)
    made = cbqstream(
        "quantize",
        str(folder),
        str(out),
        "--dataset",
        str(tokens),
        "--num-samples",
        str(samples),
        "--seq-len",
        str(SEQ_LEN),
        "--group-size",
        "64",
        "--init",
        "minmax",
        "--overlap",
        "0",
        "--epochs",
        "1",
    )
    for path in (folder, out, Path(f"{out}.run")):
        shutil.rmtree(path)
    sizes = {"hidden": hidden, "blocks": blocks, "samples": samples, "checkpoint": size}
    return {**sizes, "peak_rss": made.peak_rss, "seconds": made.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "memory.json")
    parser.add_argument("--rows", nargs="+", default=ROWS, type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--write", nargs=2, type=int, metavar=("HIDDEN", "BLOCKS"), help="only a checkpoint into WORK")
    args = parser.parse_args()
    if args.write:
        print(write_checkpoint(args.work, args.write[1], args.write[0]))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(args.work, *row) for row in args.rows]
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps(rows, indent=1) + "\n")
    print("| hidden | blocks | samples | checkpoint, GiB | peak RSS, GiB | against the row above | seconds |")
    print("|---|---|---|---|---|---|---|")
    for index, row in enumerate(rows):
        against = f"{row['peak_rss'] / rows[index - 1]['peak_rss']:.3f}" if index % 2 else ""
        sizes = f"{row['hidden']} | {row['blocks']} | {row['samples']} | {row['checkpoint'] / 2**30:.2f}"
        print(f"| {sizes} | {row['peak_rss'] / 2**30:.2f} | {against} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
