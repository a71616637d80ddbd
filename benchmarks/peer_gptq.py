#!/usr/bin/env python3
"""GPTQ as llm-compressor has it, on the tokens that this project calibrates with. Runs in a virtual environment of its own.

Usage: peer_gptq.py MODEL TOKENS.npy --bits 3 --group-size 64 [--asymmetric] [--act-bits 8] TEXT ...

TOKENS.npy holds token ids, int64 [segments, length]. Prints one line of JSON: seconds from start to quantized model, peak RSS at that
moment in bytes, and the perplexity on each TEXT of the model that it leaves in memory, in float32.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from plain_perplexity import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True, help="-1 is one scale per channel")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--act-bits", type=int, default=16)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = np.load(args.tokens)
    grouped = args.group_size > 0
    weights = QuantizationArgs(
        num_bits=args.bits,
        symmetric=not args.asymmetric,
        strategy="group" if grouped else "channel",
        group_size=args.group_size if grouped else None,
    )
    activations = None
    if args.act_bits < 16:
        activations = QuantizationArgs(num_bits=args.act_bits, symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    result = {
        "seconds": time.time() - psutil.Process().create_time(),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for text in args.texts:
        result[text.stem] = perplexity(model, tokenizer, text)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
