"""Models that are stored in another layout than transformers computes with: fused experts, split or concatenated or transposed tensors."""

import json

import pytest
from safetensors.torch import load_file, save_file

from cbqstream.commands.check import check
from cbqstream.errors import InputError
from cbqstream.evaluation.model import open_model

TYPES = {
    "ernie4_5_vl_moe": "experts of text and image have the numbers of one list",
    "gpt_oss": "fused experts are transposed and interleaved, and have biases",
    "llama4": "fused experts are transposed, and get tokens in the order of the experts",
    "longcat_flash": "some experts have no weights",
    "lara_mini": "one matrix is split into several layers",
    "olmo_hybrid": "convolutions are concatenated",
    "qwen3_vl_moe": "fused experts are transposed as they are read",
    "step3p7": "fused experts are stored as two tensors",
}
"""Types, with what is special about how they are stored."""


@pytest.mark.parametrize("name", TYPES)
def test_it_evaluates_as_transformers_and_the_result_loads(tool, tmp_path, name):
    tool.make_model(name, tmp_path)
    assert tool.streamed_difference(tmp_path) < tool.NEAR
    tool.quantize_model(tmp_path)
    found = check(tmp_path / "out", read_data=True, load=True)
    assert found.problems == []
    lacking = name != "llama4"
    assert ("transformers itself lacks rules for it" in found.facts[-1]) == lacking


def test_what_stays_in_full_precision_is_copied_as_it_is_stored(tool, tmp_path, make_config):
    """Convolutions of quantized blocks, and fused experts of whole blocks."""
    for name, kept, stored in (
        ("olmo_hybrid", {}, "model.layers.0.linear_attn.q_conv1d.weight"),
        ("qwen3_vl_moe", {"keep_first": 1}, "model.language_model.layers.0.mlp.experts.gate_up_proj"),
    ):
        tool.make_model(name, tmp_path / name)
        source = tmp_path / name / "source"
        settings = {"num_samples": 8, "reconstruction": {"rounding": "nearest"}, **kept}
        out = tool.quantize(make_config(name=f"{name}-out", model=source, **settings))
        before, after = open_model(source)[1].stored[stored], open_model(out)[1].checkpoint.stored[stored]
        contents = [info.file.read_bytes()[info.start : info.end] for info in (before, after)]
        assert contents[0] == contents[1]
        ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
        assert stored.removesuffix(".weight") in ignored


def test_a_fused_tensor_with_too_few_experts_is_refused_by_name(tool, tmp_path):
    tool.make_model("gpt_oss", tmp_path)
    folder = tmp_path / "source"
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.experts.gate_up_proj"
    save_file({**tensors, name: tensors[name][:3].clone()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf'tensor "{name}": has shape \[3, .*but config\.json requires 4 experts'):
        open_model(folder)
