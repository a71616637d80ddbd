#!/usr/bin/env python3
"""Write a Mixtral whose experts are made from the feed-forward layers of a Llama, so that it predicts text about as well as the Llama.

Usage: mixture_model.py MODEL FOLDER [--experts 4]

MODEL is a Llama without biases, such as the folder that tools/get_smollm2.py writes. Every expert has its inner channels in an order of its
own and a little noise: a program that exchanges layers between experts, or rows within one, computes something else. The router is random
and chooses two experts for a token.
"""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOISE = 0.05
"""Standard deviation of the noise of an expert, relative to that of the weight."""
LEAVES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
COPIED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
ALSO_COPIED = (
    "vocab_size",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "max_position_embeddings",
    "dtype",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def experts_of(name: str, weight: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    """Weights of all experts that are made from a feed-forward weight of the Llama, and the router with the first of them.

    Args:
        name: name of the weight.
        weight: its values, bf16.
        experts: number of experts.
    """
    block, leaf = re.fullmatch(r"(model\.layers\.\d+)\.mlp\.(\w+)\.weight", name).groups()
    number, made = int(block.rsplit(".", 1)[1]), {}
    channels = 1 if leaf == "down_proj" else 0  # dimension of the inner channels
    for expert in range(experts):
        seed = number * experts + expert
        order = torch.randperm(weight.shape[channels], generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(1000 * (1 + list(LEAVES).index(leaf)) + seed)
        noise = torch.randn(weight.shape, generator=generator) * NOISE * weight.float().std()
        values = (weight.float() + noise).to(weight.dtype).index_select(channels, order)
        made[f"{block}.block_sparse_moe.experts.{expert}.{LEAVES[leaf]}.weight"] = values.contiguous()
    if leaf == "gate_proj":
        router = torch.randn(experts, weight.shape[1], generator=torch.Generator().manual_seed(number))
        made[f"{block}.block_sparse_moe.gate.weight"] = (router * 0.1).to(weight.dtype)
    return made


def write_mixture(model: Path, folder: Path, config: dict, made_from: Callable[[str, torch.Tensor], dict]) -> None:
    """Write a mixture that has the weights of a Llama, except those of the feed-forward layers, and its tokenizer.

    Args:
        model: folder of the Llama.
        folder: folder to create; an old one is replaced.
        config: settings of the mixture.
        made_from: makes the weights of the experts, by name, from the name and the values of a feed-forward weight.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weight_map, size = {}, 0
    for shard in sorted(model.glob("*.safetensors")):
        tensors = {}
        for name, value in load_file(shard).items():
            tensors |= made_from(name, value) if ".mlp." in name else {name: value}
        save_file(tensors, folder / shard.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
        size += sum(value.nbytes for value in tensors.values())
    for pattern in ("*token*", "chat_template*", "generation_config.json"):
        for file in model.glob(pattern):
            shutil.copy(file, folder)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the Llama")
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--experts", type=int, default=4, help="experts per block")
    args = parser.parse_args()
    source = json.loads((args.model / "config.json").read_text())
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **{key: source[key] for key in (*COPIED, *ALSO_COPIED, *TOKENS)},
        "num_local_experts": args.experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    write_mixture(args.model, args.folder, config, lambda name, value: experts_of(name, value, args.experts))


if __name__ == "__main__":
    main()
