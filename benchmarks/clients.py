#!/usr/bin/env python3
"""Run a result in other programs: transformers from OUT, and llama.cpp from the GGUF export of OUT.

Usage: clients.py MODEL OUT WORK [--segments 16] [--seq-len 512] [--threads 1] [--text FILE] [--results FILE]

MODEL is the source, OUT a result with symmetric weights of 4 bits, WORK a folder for the export, which is replaced. Both programs continue
a prompt greedily. The perplexity of llama.cpp (Python package xllamacpp) is computed over the same tokens as the perplexity of the streamed
evaluation: each token is forced with logit_bias, which leaves the reported probability unchanged, after the tokens before it, which stay in
the cache. llama.cpp quantizes inputs to 8 bits on the CPU.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
import xllamacpp
from measure import save
from streamed import streamed_log_probabilities
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbqstream.calibration.segments import load_segments
from cbqstream.commands.export import export

HERE = Path(__file__).resolve().parent
PROMPT = "The capital of France is"
FORCE = 1000.0
"""Logit bias that makes a token certain."""


class LlamaCpp:
    """A GGUF file in llama.cpp, with as many threads as torch uses."""

    def __init__(self, file: Path, context: int) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), context, 1, False
        settings.verbosity = 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        self._server = xllamacpp.Server(settings)

    def complete(self, prompt: str | list[int], tokens: int, **options: object) -> dict:
        """Response of the completion endpoint."""
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": True, **options}
        response = self._server.handle_completions(request)
        return response if isinstance(response, dict) else json.loads(response)

    def log_probability(self, before: list[int], token: int) -> float | None:
        """Log-probability of a token after others; None if the token is a part of a character, for which llama.cpp reports none."""
        answer = self.complete(before, 1, n_probs=1, logit_bias=[[token, FORCE]])
        reported = (answer["choices"][0]["logprobs"] or {}).get("content")
        if not reported:
            return None
        assert reported[0]["id"] == token, reported
        return reported[0]["logprob"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the original model")
    parser.add_argument("out", type=Path, help="folder of the quantized model")
    parser.add_argument("work", type=Path, help="folder for the GGUF export; it is deleted first")
    parser.add_argument("--segments", type=int, default=16, help="segments for the perplexity")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a segment")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "wikitext2-test.txt", help="text of the segments")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "clients.json", help="JSON file for the row")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.parent.mkdir(parents=True, exist_ok=True)
    export(args.out, args.work, "gguf")
    (file,) = args.work.glob("*.gguf")

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    continuation = tokenizer.decode(generated)
    print(f"transformers: {PROMPT!r} -> {continuation!r}")

    llama = LlamaCpp(file, args.seq_len + 8)
    text = llama.complete(PROMPT, 16)["choices"][0]["text"]
    print(f"llama.cpp:    {PROMPT!r} -> {text!r}")
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    ids = load_segments(args.text, args.model, num_samples=args.segments, seq_len=args.seq_len, vocab_size=vocabulary)
    expected = streamed_log_probabilities(args.out, ids, args.threads)
    began, pairs = time.monotonic(), []
    for segment, known in zip(ids.tolist(), expected, strict=True):
        for place in range(1, len(segment)):
            reported = llama.log_probability(segment[:place], segment[place])
            if reported is not None:
                pairs.append((known[place - 1], reported))
    streamed, found = (math.exp(-sum(values) / len(pairs)) for values in zip(*pairs, strict=True))
    perplexities = f"streamed {streamed:.4f}, llama.cpp {found:.4f}, ratio {found / streamed:.4f}"
    print(f"perplexity of {len(pairs):,} tokens: {perplexities}")
    row = {"streamed": streamed, "llama.cpp": found, "tokens": len(pairs), "seconds": time.monotonic() - began}
    save(args.results, args.out.name, {**row, "transformers says": continuation, "llama.cpp says": text})


if __name__ == "__main__":
    main()
