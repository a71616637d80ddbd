"""Well-known models as they are published, one or two for each way of storing weights. `tools/published.py` tries all of them."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from cbqstream.evaluation.model import open_model
from families import page

MODELS = (
    "Kimi K2",  # FP8 in blocks; a model type that transformers does not know
    "DeepSeek V4",  # FP4 experts, powers of two as scales, names without the prefix of the base model
    "Kimi K2.5, K2.6",  # INT4 experts, described in text_config
    "gpt-oss",  # fused MXFP4 experts with biases
    "Mistral Small 4",  # fused FP8 experts with one scale each
    "Nemotron 3 NVFP4",  # two formats of ModelOpt
)


@pytest.fixture
def tool(tool_named):
    """The module of `tools/published.py`."""
    return tool_named("published")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # transformers warns about published descriptions that it does not use
def test_a_published_model_is_right_from_source_to_result(tool, tmp_path, name):
    record = tool.try_published(name, tmp_path / "model")
    assert {stage: record[stage] for stage in tool.STAGES} == dict.fromkeys(tool.STAGES, "yes"), record["line"]
    assert not (tmp_path / "model" / "resumed").exists()


def test_the_tiny_layers_of_gemma_3n_are_not_quantized(tool, tmp_path):
    """They have 4 columns, fewer than a group."""
    tool.make_published("Gemma 3n", tmp_path / "model")
    meta_model, _ = open_model(tmp_path / "model" / "source")
    assert "altup.correction_coefs" in dict(meta_model.templates[0].named_modules())
    linears = {name for spec in meta_model.blocks for name in spec.linears}
    assert "mlp.down_proj" in linears
    assert not [name for name in linears if "altup" in name]


def test_other_logits_and_a_resumed_run_with_other_bytes_are_found(tool, tmp_path, monkeypatch):
    """The run that is resumed leaves layers in full precision, so its result differs."""
    made = tool.settings_for

    def other(folder, out):
        settings = made(folder, out)
        return settings if out == "out" else replace(settings, ignore=("down_proj",))

    monkeypatch.setattr(tool, "settings_for", other)
    monkeypatch.setattr(tool, "streamed_difference", lambda folder: 0.01)
    record = tool.try_published("Qwen3", tmp_path / "model")
    assert [record[stage] for stage in tool.STAGES] == ["NO", "yes", "NO", "yes"]
    assert "logits differ by 1.0e-02" in record["line"]
    assert "the resumed run wrote another" in record["line"]


def test_a_model_that_transformers_does_not_have_is_refused_with_the_reason(tool, tmp_path):
    record = tool.try_published("Kimi K3", tmp_path / "model")
    assert [record[stage] for stage in tool.STAGES] == ["refused", "refused", "", ""]
    assert record["line"] == (
        'source/config.json: architecture "kimi_k3" needs remote code, which is never run. Use another model.'
    )


def test_what_is_published_quantized_is_stored_quantized(tool, tmp_path):
    """Parts of DeepSeek V3 in their published form: routers, norms and the head of the further block are not quantized."""
    tool.make_published("DeepSeek V3, V3.1, R1", tmp_path / "model")
    dtypes = {
        name: str(value.dtype).removeprefix("torch.")
        for name, value in load_file(tmp_path / "model" / "source" / "model.safetensors").items()
    }
    block = "model.layers.3."
    assert dtypes[f"{block}mlp.experts.2.up_proj.weight"] == "float8_e4m3fn"
    assert dtypes[f"{block}mlp.experts.2.up_proj.weight_scale_inv"] == "float32"
    assert dtypes["model.layers.1.mlp.shared_experts.gate_proj.weight"] == "float8_e4m3fn"
    assert dtypes["model.layers.4.self_attn.q_a_proj.weight"] == "float8_e4m3fn"
    for name in ("mlp.gate.weight", "input_layernorm.weight"):
        assert dtypes[f"{block}{name}"] == "bfloat16"
    for name in ("eh_proj", "embed_tokens", "shared_head.head", "enorm"):
        assert dtypes[f"model.layers.4.{name}.weight"] == "bfloat16"
    assert dtypes[f"{block}mlp.gate.e_score_correction_bias"] == "float32"


def test_the_table_has_a_row_for_each_model(tmp_path, monkeypatch):
    """The last result of a model counts, and the text around the table is kept."""
    stages = {"storage": "bf16", "evaluate": "yes", "quantize": "refused", "resume": "", "load": ""}
    records = [{"type": name, **stages, "line": line} for name, line in (("A", "old"), ("B", "x | y"), ("A", "new"))]
    results, target = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    target.write_text("before\n<!-- published -->\nold\n<!-- end of published -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["page.py", str(results), "5.24.0", str(target)])
    page.main()
    lines = target.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert [line for line in lines if line.startswith(("| A", "| B"))] == [
        "| A | bf16 | yes | refused |  |  | new |",
        r"| B | bf16 | yes | refused |  |  | x \| y |",
    ]
