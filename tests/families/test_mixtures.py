"""`check --load` of mixtures of experts: no false alarm for any seed, and a damaged expert is found.

transformers dequantizes experts as it loads them, to the dtype of their scales, and computes with them in it. A router that is near a tie
would then choose other experts.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from cbqstream import quantize
from cbqstream.commands.check import check
from cbqstream.evaluation.model import open_model
from cbqstream.models.block import build_block
from cbqstream.scheme import Scheme
from perplexities import streamed_perplexity
from tiny import FAMILIES, VOCAB, save_model

SEEDS = 20 if os.environ.get("CBQSTREAM_FAMILIES") else 2
_NEXT = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 64,
}
MIXTURES = {
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {},
    "qwen3_next": {**FAMILIES["qwen3_moe"], **_NEXT},
    "glm4_moe_lite": FAMILIES["deepseek_v3"],
}
"""Settings of each mixture, for families that are not in `FAMILIES`."""


def saved(tmp_path, family, seed):
    like = family if family in FAMILIES else "qwen3_moe"
    return save_model(tmp_path / "model", family, like=like, seed=seed, **MIXTURES[family])


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", MIXTURES)
def test_a_right_mixture_is_not_condemned(tmp_path, make_config, family, seed):
    """The source has bf16 weights, so the experts in transformers are rounded."""
    config = make_config(model=saved(tmp_path, family, seed), reconstruction={"rounding": "nearest"}, num_samples=8)
    found = check(quantize(config), read_data=False, load=True)
    assert found.problems == []
    assert "same next token after 32 of 32" in found.facts[-1]


@pytest.mark.parametrize("bits", [None, 8])
def test_a_damaged_expert_is_found_although_no_token_reaches_it(tmp_path, make_config, monkeypatch, bits):
    """The expert is damaged as transformers loads it, and the router never chooses it. Its inputs may be quantized."""
    scheme = Scheme(num_bits=4, group_size=32, activation_bits=bits)
    folder = saved(tmp_path, "mixtral", 0)
    out = quantize(make_config(model=folder, scheme=scheme, reconstruction={"rounding": "nearest"}, num_samples=8))
    assert check(out, read_data=False, load=True).problems == []
    load = MixtralForCausalLM.from_pretrained

    def load_damaged(*args, **options):
        model, info = load(*args, **options)
        with torch.no_grad():
            model.model.layers[2].mlp.experts.down_proj[3, 5, 7] += 0.5
        return model, info

    monkeypatch.setattr(MixtralForCausalLM, "from_pretrained", load_damaged)
    problems = check(out, read_data=False, load=True).problems
    stored = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    assert problems == [f'{out}: tensor "{stored}": differs in transformers from the value in the checkpoint.']


def test_experts_are_found_in_a_checkpoint_without_the_prefix_of_the_base_model(tmp_path):
    """DeepSeek V4 is published so, and with other names of experts than those of transformers."""
    folder = save_model(tmp_path / "model", "mixtral", dtype=torch.float32, max_shard_size="1GB")
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = streamed_perplexity(folder, ids)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, folder / "model.safetensors")
    assert "layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(folder / "model.safetensors")
    assert streamed_perplexity(folder, ids) == expected


def test_experts_of_a_model_type_that_transformers_has_under_another_name_are_loaded(tmp_path, make_config):
    folder = save_model(tmp_path / "model", "deepseek_v3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    out = quantize(make_config(model=folder, reconstruction={"rounding": "nearest"}, num_samples=8))
    assert json.loads((out / "config.json").read_text())["model_type"] == "kimi_k2"
    assert check(out, read_data=False, load=True).problems == []


def test_a_bias_of_a_router_in_float32_is_not_rounded(tmp_path):
    """transformers has it as a buffer, in the dtype of the model, but the block computes in float32."""
    folder = save_model(tmp_path / "model", "minimax_m2", like="mixtral", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if "layers.1." in name and name.endswith("e_score_correction_bias"))
    tensors[name] = torch.tensor([8.001, 8.002, 8.003, 8.004])
    save_file(tensors, folder / "model.safetensors")
    meta_model, source = open_model(folder)
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "linear_dtype": None}
    block = build_block(meta_model, 1, source, **options)
    (bias,) = (value for key, value in block.named_buffers() if key.endswith("e_score_correction_bias"))
    assert torch.equal(bias, tensors[name])
