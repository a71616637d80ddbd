#!/usr/bin/env python3
"""Load a model folder in vLLM on the CPU, continue a prompt, and compute the log-probabilities of given tokens.

Usage: PYTHON_OF_VLLM peer_vllm.py FOLDER TOKENS PROMPT ROW [--reference-kernels]

TOKENS is a .npy file of token ids [N, S]. ROW is a JSON file to write: `version` of vLLM, and `continuation` and `log_probabilities` of
tokens 2 to S, or the `error` with which vLLM refused the folder. With --reference-kernels, kernels of `vllm_kernels.py` take the place of
those that are missing or inexact on this CPU; `reference kernels` names the kinds of layers that they computed. The script does not import
cbqstream.
"""

import json
import os
import sys
from pathlib import Path

# one process, so that errors can be caught; its threads are not bound to cores; 4-bit layers with AMX do not round their inputs to 8 bits
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_INT4_W4A8": "0"}
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import numpy as np
import vllm
import vllm_kernels


def measure(folder: str, tokens: list[list[int]], prompt: str) -> dict:
    """Continuation of the prompt, and log-probabilities of the tokens."""
    sizes = {"max_model_len": len(tokens[0]) + 1, "max_num_seqs": 4}
    model = vllm.LLM(folder, dtype="bfloat16", enforce_eager=True, distributed_executor_backend="uni", **sizes)
    (said,) = model.generate([prompt], vllm.SamplingParams(temperature=0, max_tokens=16))
    asked = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)  # 0: of the token itself alone
    scored = model.generate([{"prompt_token_ids": ids} for ids in tokens], asked)
    found = [
        [place[token].logprob for place, token in zip(each.prompt_logprobs[1:], ids[1:], strict=True)]
        for each, ids in zip(scored, tokens, strict=True)
    ]
    return {"continuation": said.outputs[0].text, "log_probabilities": found}


def main() -> None:
    if len(sys.argv) not in (5, 6) or sys.argv[5:] not in ([], ["--reference-kernels"]):
        sys.exit(__doc__)
    folder, tokens, prompt, out = sys.argv[1], np.load(sys.argv[2]).tolist(), sys.argv[3], Path(sys.argv[4])
    row = {"version": vllm.__version__}
    if sys.argv[5:]:
        vllm_kernels.install()
    try:
        row |= measure(folder, tokens, prompt)
    except Exception as error:  # noqa: BLE001  what vLLM raises is the result
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    out.write_text(json.dumps({**row, "reference kernels": sorted(vllm_kernels.used)}))


if __name__ == "__main__":
    main()
