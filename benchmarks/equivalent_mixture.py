#!/usr/bin/env python3
"""Write a Mixtral that computes the same as a Llama: the neurons of each feed-forward layer are divided among experts that are all active.

Usage: equivalent_mixture.py MODEL FOLDER [--experts 8] [--check TEXT]

MODEL is a Llama without biases, such as the folder that tools/get_smollm2.py writes. The router is zero, so every expert has the weight 1 /
EXPERTS, and the weights of down_proj are multiplied by EXPERTS, a power of two, which is exact in bf16. What quantization does to the
mixture can therefore be compared with what it does to the Llama.

--check compares the two: the logits of the first 4 x 512 tokens of data/c4-calibration.jsonl by plain transformers in float32, and the
perplexity over 8 x 512 tokens of a text by `cbqstream eval`. The exit code is 1 if they differ.
"""

import argparse
import re
from pathlib import Path

import torch
from measure import cbqstream, cut_tokens, perplexity
from mixture_model import ALSO_COPIED, COPIED, LEAVES, TOKENS, write_mixture
from transformers import AutoModelForCausalLM, LlamaConfig

TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest logit."""
SETTINGS = (*COPIED, *ALSO_COPIED, *TOKENS, "hidden_act")
"""Settings that the mixture has from the Llama."""


def experts_of(name: str, weight: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    """Weights of all experts that a feed-forward weight of the Llama is divided into, and the router with the first of them.

    Args:
        name: name of the weight.
        weight: its values.
        experts: number of experts.
    """
    block, leaf = re.fullmatch(r"(model\.layers\.\d+)\.mlp\.(\w+)\.weight", name).groups()
    down = leaf == "down_proj"
    parts = (weight * experts if down else weight).chunk(experts, dim=1 if down else 0)
    mixture = f"{block}.block_sparse_moe"
    made = {f"{mixture}.experts.{index}.{LEAVES[leaf]}.weight": part.contiguous() for index, part in enumerate(parts)}
    if leaf == "gate_proj":
        made[f"{mixture}.gate.weight"] = torch.zeros(experts, weight.shape[1], dtype=weight.dtype)
    return made


def write_equivalent(model: Path, folder: Path, experts: int) -> None:
    """Write the mixture.

    Raises:
        SystemExit: the model is not a Llama without biases, or the number of experts is not possible.
    """
    source = LlamaConfig.from_pretrained(model)  # with the defaults of a Llama, which differ from those of a Mixtral
    if source.model_type != "llama" or source.attention_bias or source.mlp_bias:
        raise SystemExit(f"{model}: not a Llama without biases.")
    if experts & (experts - 1) or source.intermediate_size % experts:
        raise SystemExit(f"--experts {experts}: use a power of two that divides {source.intermediate_size}.")
    settings = source.to_dict()
    config = {
        **{key: settings[key] for key in SETTINGS},
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": source.intermediate_size // experts,
        "num_local_experts": experts,
        "num_experts_per_tok": experts,
        "sliding_window": None,
    }
    write_mixture(model, folder, config, lambda name, value: experts_of(name, value, experts))


@torch.no_grad()
def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model by plain transformers, float32 [segments, tokens, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat([model(segment[None], use_cache=False).logits for segment in ids])


def check(model: Path, folder: Path, text: Path) -> bool:
    """Whether the mixture computes the same as the Llama. Prints the differences."""
    import numpy as np

    ids = torch.from_numpy(np.load(cut_tokens(model, folder / "check.npy", 0, 4)))
    (folder / "check.npy").unlink()
    expected, found = logits_of(model, ids), logits_of(folder, ids)
    difference = float((found - expected).abs().max() / expected.abs().max())
    options = ["--text", str(text), "--num-samples", "8"]
    first, second = (perplexity(cbqstream("eval", str(path), *options)) for path in (model, folder))
    print(f"largest difference of logits: {difference:.1e} of the largest logit (at most {TOLERANCE:.0e})")
    print(f"perplexity: {first:.4f} of the Llama, {second:.4f} of the mixture")
    return difference <= TOLERANCE and f"{first:.4g}" == f"{second:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the Llama")
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--experts", type=int, default=8, help="experts per block, a power of two")
    parser.add_argument("--check", type=Path, metavar="TEXT", help="compare the mixture with the Llama")
    args = parser.parse_args()
    write_equivalent(args.model, args.folder, args.experts)
    if args.check and not check(args.model, args.folder, args.check):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
