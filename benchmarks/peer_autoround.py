#!/usr/bin/env python3
"""auto-round on the tokens that this project calibrates with, measured as this project is. Runs in a virtual environment of its own.

Usage: peer_autoround.py MODEL TOKENS.npy --bits 2 --group-size 64 [--asymmetric] [--act-bits 8] --iters 200 [--alg-ext] TEXT ...

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
from auto_round import AutoRound
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
    parser.add_argument("--iters", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--alg-ext", action="store_true")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = torch.from_numpy(np.load(args.tokens))
    quantizer = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asymmetric,
        act_bits=args.act_bits,
        act_group_size=-1,
        act_sym=True,
        act_dynamic=True,
        iters=args.iters,
        batch_size=args.batch_size,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
        enable_alg_ext=args.alg_ext,
        seed=0,
    )
    quantized, _ = quantizer.quantize()
    result = {
        "seconds": time.time() - psutil.Process().create_time(),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    quantized = quantized.float().eval()
    for text in args.texts:
        result[text.stem] = perplexity(quantized, tokenizer, text)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
