"""Models whose layers have different schemes: some layers in full precision, some of another width, and a quantized head."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from cbqstream import quantize
from cbqstream.calibration.segments import load_segments
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.commands.check import check
from cbqstream.commands.export import export
from cbqstream.config import TransformConfig
from cbqstream.errors import StoppedError, UsageError
from cbqstream.evaluation.model import open_model
from cbqstream.records import RunWarning
from cbqstream.scheme import Scheme, path_pattern
from perplexities import plain_perplexity, streamed_perplexity
from tiny import SEQ_LEN, VOCAB, save_model

CPU = torch.device("cpu")
SMOOTHED = TransformConfig(smoothing="always", smoothing_rule="search")


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("down_proj", "model.layers.3.mlp.down_proj", True),
        ("down_proj", "model.layers.3.mlp.down_projection", False),
        ("layers.3", "model.layers.3.mlp.down_proj", True),
        ("layers.3", "model.layers.33.mlp.down_proj", False),
        ("layers.?.mlp.*", "model.layers.3.mlp.down_proj", True),
        ("layers.?.mlp.*", "model.layers.13.mlp.down_proj", False),
        ("*_proj", "model.layers.3.mlp.down_proj", True),
        ("model.layers.3.mlp.down_proj", "model.layers.3.mlp.down_proj", True),
        ("down.proj", "model.layers.3.mlp.down_proj", False),
    ],
)
def test_a_pattern_matches_whole_parts_of_a_module_path(pattern, path, matches):
    assert bool(re.fullmatch(path_pattern(pattern), path)) == matches


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3_moe"])
@pytest.mark.parametrize(
    "scheme", [Scheme(num_bits=4, group_size=32), Scheme(num_bits=3, group_size=16, activation_bits=8)]
)
def test_transformers_loads_a_model_with_mixed_schemes_and_gives_the_same_perplexity(
    make_config, tokens, family, scheme
):
    """One kind of layer stays in full precision, another has 8 bits, and the last block may stay in full precision too.

    With experts, the last block is quantized, because transformers does not load a model in which only some blocks have quantized experts.
    """
    if family != "llama" and scheme.activation_bits:
        pytest.skip("transformers quantizes the inputs of this family differently, see tests/families/test_result.py")
    ignored, other = {"llama": ("o_proj", "down_proj"), "opt": ("fc2", "fc1"), "qwen3_moe": ("o_proj", "v_proj")}[
        family
    ]
    others = ("q_proj=W8", "k_proj=W8", "v_proj=W8") if other == "v_proj" else (f"{other}=W8",)
    config = make_config(
        family, scheme=scheme, ignore=(ignored, "layers.1"), override=others, keep_last=1, transforms=SMOOTHED
    )
    with pytest.raises(UsageError, match=r"--ignore leaves no layer of model\.(decoder\.)?layers\.1 to quantize"):
        quantize(config)
    kept = int(family != "qwen3_moe")
    config = make_config(family, scheme=scheme, ignore=(ignored,), override=others, keep_last=kept, transforms=SMOOTHED)
    out = quantize(config)
    meta_model, source = open_model(out)
    stored = Checkpoint.open(out).infos
    prefix = meta_model.blocks[1].prefix
    for name in meta_model.blocks[1].linears:
        columns = source.tensors()[f"{prefix}.{name}.weight"][1]
        packed = stored.get(f"{prefix}.{name}.weight_packed")
        bits = 8 if any(name.endswith(text.removesuffix("=W8")) for text in others) else scheme.num_bits
        assert (packed is None) == name.endswith(ignored)
        assert packed is None or packed.shape[1] == -(-columns * bits // 32)
    assert kept == (f"{meta_model.blocks[3].prefix}.{meta_model.blocks[3].linears[0]}.weight" in stored)
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    rel = 1e-3 if family == "qwen3_moe" else 1e-4
    assert streamed_perplexity(out, ids) == pytest.approx(plain_perplexity(out, ids), rel=rel)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    widths = {group["targets"][0]: group["weights"]["num_bits"] for group in groups.values()}
    fused = ["qkv_proj"] if other == "v_proj" else []  # name in vLLM of the three layers, which it computes as one
    patterns = [text.removesuffix("=W8") for text in others] + fused
    assert widths == {f"re:(?:.*\\.)?{name}(?:\\..*)?$": 8 for name in patterns} | {"Linear": scheme.num_bits}


@pytest.mark.parametrize(("family", "narrow"), [("llama", "down_proj"), ("qwen3_moe", "experts")])
def test_transformers_loads_a_model_with_layers_of_two_formats(make_config, tokens, family, narrow):
    """W8A8 per channel is int-quantized, and the layers of 4 bits are pack-quantized. Those may be all experts."""
    scheme = Scheme(num_bits=8, group_size=None, activation_bits=8)
    config = make_config(family, scheme=scheme, override=(f"{narrow}=W4",), reconstruction={"rounding": "nearest"})
    out = quantize(config)
    stored = Checkpoint.open(out).infos
    packed = {name for name in stored if name.endswith(".weight_packed")}
    assert packed == {f"{name.rpartition('.')[0]}.weight_packed" for name in stored if narrow in name}
    assert stored["model.layers.1.self_attn.q_proj.weight"].dtype == torch.int8
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert found["format"] == "mixed-precision"
    assert [group["format"] for group in found["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    checked = check(out, read_data=True, load=True)
    assert checked.problems == []
    assert re.search(r"loads it as \w+: logits within", checked.facts[-1])
    if family == "llama":  # transformers does not quantize the inputs of experts
        ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
        assert streamed_perplexity(out, ids) == pytest.approx(plain_perplexity(out, ids), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"override": ("q_proj=W8",)},
            r"layers\.0: inference engines compute self_attn\.q_proj and self_attn\.k_proj as one",
        ),
        ({"ignore": ("up_proj",)}, r"layers\.0: inference engines compute mlp\.gate_proj and mlp\.up_proj as one"),
        ({"override": ("mlp.*=W8", "down_proj=W3")}, r"layers\.0\.mlp\.down_proj: two overrides match it"),
        (
            {"ignore": ("donw_proj",)},
            r'"donw_proj" matches no layer\. Use a path such as model\.layers\.0\.self_attn\.q_proj',
        ),
        ({"override": ("layers.4=W8",)}, r'"layers\.4" matches no layer'),
        ({"ignore": ("*",)}, r"--ignore leaves no layer of model\.layers\.0 to quantize"),
    ],
)
def test_patterns_that_match_nothing_or_that_split_joined_layers_are_refused(make_config, settings, message):
    with pytest.raises(UsageError, match=message):
        quantize(make_config(**settings))


def test_different_schemes_for_the_experts_of_a_block_are_refused(make_config):
    joined = r"compute mlp\.experts\.0\.gate_proj and mlp\.experts\.1\.gate_proj as one"
    with pytest.raises(UsageError, match=joined):
        quantize(make_config("qwen3_moe", ignore=("experts.0",)))


def test_a_pattern_must_match_a_layer_by_its_module_path_and_by_its_name_in_the_checkpoint(make_config):
    """The experts of Mixtral have other names in checkpoints than in transformers."""
    message = r"matches model\.layers\.0\.mlp\.experts\.0\.gate_proj and not model\.layers\.0\.block_sparse_moe\.experts\.0\.w1"
    with pytest.raises(UsageError, match=message):
        quantize(make_config("mixtral", override=("mlp=W8",)))
    out = quantize(make_config("mixtral", override=("experts=W8",)))
    assert (
        open_model(out)[0]
        .blocks[0]
        .tensors["mlp.experts.0.gate_proj.weight"]
        .endswith("block_sparse_moe.experts.0.w1.weight")
    )


@pytest.mark.parametrize("text", ["down_proj", "down_proj=8", "=W8", "down_proj=W9"])
def test_an_override_of_another_form_than_a_pattern_and_a_width_is_refused(make_config, text):
    with pytest.raises(UsageError, match="is not as PATTERN=W8"):
        make_config(override=(text,))


W8A8 = Scheme(num_bits=8, group_size=None, activation_bits=8)


@pytest.mark.parametrize(
    ("family", "settings", "warned"),
    [
        ("qwen3_moe", {"keep_last": 1}, "the experts of some blocks are quantized and those of others are not"),
        ("qwen3_moe", {"ignore": ("experts",)}, "the experts are in full precision and other layers are not"),
        ("qwen3_moe", {"scheme": W8A8}, "the experts are stored as int-quantized"),
        ("qwen3_moe", {"scheme": W8A8, "override": ("experts=W4",)}, None),
        ("qwen3_moe", {}, None),
        ("llama", {"keep_last": 1}, None),
        ("llama", {"scheme": W8A8}, None),
        ("deepseek_v3", {}, None),
    ],
)
def test_experts_that_transformers_does_not_load_give_a_warning(make_config, family, settings, warned):
    """Its loader has one rule for the experts of all blocks, and finds their codes only if they are pack-quantized."""
    events = []
    with pytest.raises(StoppedError):
        quantize(make_config(family, **settings), events.append, stop_after_window=1)
    texts = [event.text for event in events if isinstance(event, RunWarning)]
    found = [text for text in texts if "which transformers 5.24 does not load" in text]
    assert [text.partition(", which")[0] for text in found] == ([] if warned is None else [warned])


@pytest.mark.parametrize(("settings", "loads"), [({"scheme": W8A8}, False), ({"ignore": ("experts",)}, True)])
def test_experts_that_transformers_does_not_load_are_reported_and_can_be_exported(
    make_config, tokens, tmp_path, settings, loads
):
    """Experts in full precision are loaded with rules that the check gives transformers, which it says."""
    out = quantize(make_config("qwen3_moe", reconstruction={"rounding": "nearest"}, **settings))
    found = check(out, read_data=False, load=True)
    if loads:
        assert found.problems == []
        assert found.facts[-1].endswith("; transformers itself lacks rules for it")
    else:
        (problem,) = found.problems
        assert f"{out}: transformers {transformers.__version__} cannot load it: " in problem
    dense = export(out, tmp_path / "dense", "dense")
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    assert streamed_perplexity(out, ids) == pytest.approx(plain_perplexity(dense, ids), rel=1e-2)


@pytest.mark.parametrize(("family", "head"), [("llama", "lm_head"), ("gpt_neox", "embed_out")])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_is_rounded_to_nearest_and_transformers_computes_with_it(
    make_config, tokens, family, head, bits
):
    """The head has the width of the other layers, or that of an override."""
    override = () if bits == 4 else ("lm_head=W8", f"{head}=W8")
    config = make_config(family, quantize_lm_head=True, override=override, reconstruction={"rounding": "nearest"})
    out = quantize(config)
    stored, dense = Checkpoint.open(out).infos, Checkpoint.open(Path(config.model))
    assert f"{head}.weight" not in stored
    weight = dense.read(f"{head}.weight", device=CPU, dtype=torch.float32)
    assert stored[f"{head}.weight_packed"].shape == (VOCAB, weight.shape[1] * bits // 32)
    found = open_model(out)[1].read(f"{head}.weight", device=CPU)
    scale = Checkpoint.open(out).read(f"{head}.weight_scale", device=CPU).float().repeat_interleave(32, 1)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    assert torch.equal(found, (weight / scale).round().clamp(low, high) * scale)
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    assert streamed_perplexity(out, ids) == pytest.approx(plain_perplexity(out, ids), rel=1e-4)
    assert not check(out, read_data=True).problems
    assert "; the head" in (out / "README.md").read_text()
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    own = [group for group in groups if re.match(group["targets"][0].removeprefix("re:"), "lm_head")]
    assert {group["weights"]["num_bits"] for group in own} == {bits}


def test_export_of_a_quantized_head_is_refused_for_formats_that_do_not_support_it(make_config, tmp_path):
    out = quantize(make_config(quantize_lm_head=True, reconstruction={"rounding": "nearest"}))
    for name in ("gptq", "gptq_v2", "awq"):
        message = rf"format {name} does not support a quantized lm_head\. Use gguf or dense"
        with pytest.raises(UsageError, match=message):
            export(out, tmp_path / name, name)
    assert (export(out, tmp_path / "dense", "dense") / "config.json").is_file()
    assert not list(tmp_path.glob("*cbqstream.tmp"))


def test_quantizing_the_head_is_refused_where_it_is_impossible(make_config, tmp_path):
    tied = save_model(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"the head is tied to the embedding\. Leave out --quantize-lm-head"):
        quantize(make_config(model=tied, quantize_lm_head=True))
    with pytest.raises(UsageError, match=r"--quantize-lm-head quantizes no inputs\. Use a scheme with A16"):
        make_config(quantize_lm_head=True, scheme=Scheme(num_bits=4, group_size=32, activation_bits=8))
    with pytest.raises(UsageError, match=r"the head is left in full precision by --ignore\. Leave out"):
        quantize(make_config(quantize_lm_head=True, ignore=("lm_head",)))
    with pytest.raises(UsageError, match=r"matches lm_head and not embed_out, its name in the checkpoint"):
        quantize(make_config("gpt_neox", quantize_lm_head=True, override=("lm_head=W8",)))
    with pytest.raises(UsageError, match=r"group size 24 does not divide the 64 columns of lm_head\.weight"):
        quantize(make_config(quantize_lm_head=True, scheme=Scheme(num_bits=4, group_size=24)))
