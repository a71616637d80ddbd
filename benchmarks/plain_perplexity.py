#!/usr/bin/env python3
"""Perplexity of a model folder with plain transformers, the whole model in memory: the check on the streamed figure.

Usage: plain_perplexity.py FOLDER TEXT [--seq-len 512] [--num-samples 64] [--dequantize]

The text is tokenized whole and cut without overlap; segments are spread evenly over it, both ends included.
--dequantize loads asymmetric compressed-tensors models, which transformers 5.23 does not load as they are.
"""

import argparse
import math
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokenizer, text: Path, *, seq_len: int = 512, num_samples: int = 64) -> float:
    """Perplexity over `num_samples` segments of a text, each with a context of its own."""
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    rows = len(ids) // seq_len
    segments = ids[: rows * seq_len].view(rows, seq_len)
    if rows > num_samples:
        segments = segments[torch.linspace(0, rows - 1, num_samples).long()]
    total = 0.0
    for segment in segments:
        logits = model(segment[None], use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], segment[1:], reduction="sum").item()
    return math.exp(total / (len(segments) * (seq_len - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text", type=Path)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--dequantize", action="store_true")
    args = parser.parse_args()
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if args.dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    found = perplexity(model, tokenizer, args.text, seq_len=args.seq_len, num_samples=args.num_samples)
    print(f"{args.text.name}: perplexity {found:.4f} (at most {args.num_samples} x {args.seq_len} tokens)")


if __name__ == "__main__":
    main()
