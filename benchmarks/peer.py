"""What the scripts that run a peer have in common: their arguments, the model, the tokens, and what they print."""

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
    """The arguments that every peer takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path, help="token ids, int64 [segments, length], .npy")
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True, help="-1 is one scale per channel")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--act-bits", type=int, default=16)
    parser.add_argument("--threads", type=int)
    return parser


def load(args: argparse.Namespace) -> tuple:
    """Model in float32, tokenizer and tokens."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(args.model), torch.from_numpy(np.load(args.tokens))


def report(model: torch.nn.Module, tokenizer, texts: list[Path]) -> None:
    """Print one line of JSON: seconds from start to quantized model, peak RSS at that moment, and then the perplexity on each text."""
    result = {
        "seconds": time.time() - psutil.Process().create_time(),
        "cpu_seconds": time.process_time(),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for text in texts:
        result[text.stem] = perplexity(model, tokenizer, text)
    print(json.dumps(result))
