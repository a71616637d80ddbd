#!/usr/bin/env python3
"""Compute the perplexity of a model folder with plain transformers, as a check of the streamed evaluation.

Usage: plain_perplexity.py FOLDER TEXT [--seq-len 512] [--num-samples 64] [--dequantize]

The whole model is in memory. The text is tokenized as a whole and cut without overlap; the segments are spread evenly over it, both ends
included. --dequantize is needed for asymmetric compressed-tensors models, which transformers 5.23 does not load without it.
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
    """Perplexity over at most `num_samples` segments of a text. The context of a token is the part of its segment before it."""
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
    parser.add_argument("folder", help="folder of the model")
    parser.add_argument("text", type=Path, help="text file")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a segment")
    parser.add_argument("--num-samples", type=int, default=64, help="largest number of segments")
    parser.add_argument("--dequantize", action="store_true", help="dequantize the weights when they are loaded")
    args = parser.parse_args()
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if args.dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    found = perplexity(model, tokenizer, args.text, seq_len=args.seq_len, num_samples=args.num_samples)
    print(f"{args.text.name}: perplexity {found:.4f} (at most {args.num_samples} x {args.seq_len} tokens)")


if __name__ == "__main__":
    main()
