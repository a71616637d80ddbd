#!/usr/bin/env python3
"""What comes out, in the programs that people run: transformers from OUT, llama.cpp from the GGUF export of OUT.

Usage: clients.py MODEL OUT WORK [--segments 16] [--seq-len 512] [--text FILE] [--results FILE]

MODEL is the source, OUT a result of 4 symmetric bits. Both programs continue a prompt greedily. The perplexity of llama.cpp (PyPI:
xllamacpp) is that of the same tokens as the streamed evaluation's: each token is forced in its turn (--logit-bias leaves the reported
probability as it is) after the tokens before it, which stay in the cache. llama.cpp computes with inputs of 8 bits on the CPU.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbqstream.calibration.segments import load_segments
from cbqstream.commands.export import export
from cbqstream.evaluation.model import EvaluatedModel

HERE = Path(__file__).resolve().parent
PROMPT = "The capital of France is"
FORCE = 1000.0


class LlamaCpp:
    """A GGUF file in llama.cpp, on one thread."""

    def __init__(self, file: Path, context: int) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), context, 1, False
        settings.verbosity = 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        self._server = xllamacpp.Server(settings)

    def complete(self, prompt: str | list[int], tokens: int, **options: object) -> dict:
        """The answer of its completion endpoint."""
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": True, **options}
        found = self._server.handle_completions(asked)
        return found if isinstance(found, dict) else json.loads(found)

    def log_probability(self, before: list[int], token: int) -> float | None:
        """Of a token after others; None where it is a part of a character, of which llama.cpp says nothing."""
        answer = self.complete(before, 1, n_probs=1, logit_bias=[[token, FORCE]])
        said = (answer["choices"][0]["logprobs"] or {}).get("content")
        if not said:
            return None
        assert said[0]["id"] == token, said
        return said[0]["logprob"]


@torch.no_grad()
def streamed_log_probabilities(model: Path, ids_NS: torch.Tensor) -> list[list[float]]:
    """Of tokens 2 to S of each segment, by the streamed evaluation."""
    streamed, found = EvaluatedModel.open(model, device="cpu"), []
    with streamed.hidden_states([ids_NS]) as (stream,), streamed.head() as outer:
        for segment, ids_S in enumerate(ids_NS):
            logs_SV = torch.cat([logits.log_softmax(-1) for logits in outer.logits(stream.read(segment))])
            found.append(logs_SV[:-1].gather(1, ids_S[1:].unsqueeze(1)).flatten().tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--text", type=Path, default=HERE / "data" / "wikitext2-test.txt")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "clients.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.parent.mkdir(parents=True, exist_ok=True)
    export(args.out, args.work, "gguf")
    (file,) = args.work.glob("*.gguf")

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    print(f"transformers: {PROMPT!r} -> {tokenizer.decode(said)!r}")

    llama = LlamaCpp(file, args.seq_len + 8)
    text = llama.complete(PROMPT, 16)["choices"][0]["text"]
    print(f"llama.cpp:    {PROMPT!r} -> {text!r}")
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    ids = load_segments(args.text, args.model, num_samples=args.segments, seq_len=args.seq_len, vocab_size=vocabulary)
    expected = streamed_log_probabilities(args.out, ids)
    began, pairs = time.monotonic(), []
    for segment, known in zip(ids.tolist(), expected, strict=True):
        for place in range(1, len(segment)):
            heard = llama.log_probability(segment[:place], segment[place])
            if heard is not None:
                pairs.append((known[place - 1], heard))
    streamed, found = (math.exp(-sum(values) / len(pairs)) for values in zip(*pairs, strict=True))
    print(
        f"perplexity of {len(pairs):,} tokens: streamed {streamed:.4f}, llama.cpp {found:.4f}, ratio {found / streamed:.4f}"
    )
    row = {"streamed": streamed, "llama.cpp": found, "tokens": len(pairs), "seconds": time.monotonic() - began}
    save(args.results, args.out.name, {**row, "transformers says": tokenizer.decode(said), "llama.cpp says": text})


if __name__ == "__main__":
    main()
