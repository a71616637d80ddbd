"""Shared parts of the scripts that run a peer: arguments, model, calibration tokens, and the report."""

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
from plain_perplexity import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every peer script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the original model")
    parser.add_argument("tokens", type=Path, help="calibration tokens, int64 [segments, length], .npy")
    parser.add_argument("texts", type=Path, nargs="+", help="texts for the perplexity")
    parser.add_argument("--bits", type=int, required=True, help="width of the weights")
    parser.add_argument("--group-size", type=int, required=True, help="columns that share a scale; -1 is per channel")
    parser.add_argument("--asymmetric", action="store_true", help="use zero points")
    parser.add_argument("--act-bits", type=int, default=16, help="width of the inputs; 16 does not quantize them")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser


def load(args: argparse.Namespace) -> tuple:
    """Model in float32, tokenizer, and calibration tokens int64 [segments, length]."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(args.model), torch.from_numpy(np.load(args.tokens))


def report(model: torch.nn.Module, tokenizer, texts: list[Path]) -> None:
    """Print one line of JSON: costs from the start of the process until now, and the perplexity on each text."""
    result = {
        "seconds": time.time() - psutil.Process().create_time(),
        "cpu_seconds": time.process_time(),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for text in texts:
        result[text.stem] = perplexity(model, tokenizer, text)
    print(json.dumps(result))
