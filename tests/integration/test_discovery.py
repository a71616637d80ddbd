"""Discovery of blocks and layers in models of untested architectures, experts, and messages about what is not found or supported."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from cbqstream import evaluate, quantize
from cbqstream.calibration.segments import load_segments
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.commands.check import check
from cbqstream.config import ReconstructionConfig
from cbqstream.errors import InputError
from cbqstream.evaluation.model import open_model
from cbqstream.models.experts import separate_experts
from cbqstream.models.families import family_of
from cbqstream.numerics.input_statistics import InputStatistics
from cbqstream.records import Compute, RunWarning, WindowReport
from cbqstream.run.inputs import open_inputs
from cbqstream.run.warnings import model_warnings
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.windows.quantized_linear import QuantizedLinear
from perplexities import plain_perplexity, streamed_perplexity
from tiny import SEQ_LEN, VOCAB, make_model, save_model

COMPUTE = Compute(torch.device("cpu"), torch.float32, 4)


@pytest.fixture
def arcee(tmp_path):
    """Checkpoint of Arcee, an architecture that this project does not list as tested."""
    return save_model(tmp_path / "arcee", "arcee", like="llama")


def events_of(config):
    """Quantize, and return the folder of the result and all events of the run."""
    events = []
    return quantize(config, events.append), events


def test_a_model_of_an_untested_architecture_is_quantized_with_a_warning(make_config, tokens, arcee):
    out, events = events_of(make_config(model=arcee))
    warnings = [event.text for event in events if isinstance(event, RunWarning)]
    assert warnings == [f'{arcee}: architecture "arcee" is untested here; its blocks were found at "model.layers".']
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    assert streamed_perplexity(out, ids) == pytest.approx(plain_perplexity(out, ids), rel=1e-4)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.layer", r'--blocks-path "model\.layer" is not a list of blocks\. Lists: model\.layers\.$'),
        ("model", r'--blocks-path "model" is not a list of blocks\.'),
    ],
)
def test_a_blocks_path_that_is_not_a_list_of_blocks_is_refused(make_config, path, message):
    with pytest.raises(InputError, match=message):
        quantize(make_config(blocks_path=path))


def test_blocks_path_can_be_given_to_quantize_check_and_evaluate(make_config, tokens):
    out = quantize(make_config(blocks_path="model.layers"))
    assert not check(out, read_data=True, blocks_path="model.layers").problems
    options = {"seq_len": SEQ_LEN, "device": "cpu", "threads": 1}
    assert evaluate(str(out), str(tokens), blocks_path="model.layers", **options) == evaluate(out, tokens, **options)
    with pytest.raises(InputError, match=r'--blocks-path "model" is not a list of blocks\.'):
        evaluate(out, tokens, blocks_path="model", **options)


def test_a_model_without_linear_layers_is_refused(tmp_path, make_config):
    """GPT-2 has Conv1D layers, which store the transposed weight."""
    folder = save_model(tmp_path / "gpt2", "gpt2", like="opt")
    with pytest.raises(InputError, match=r"GPT2LMHeadModel have no linear layers \(those of GPT-2 are Conv1D\)"):
        quantize(make_config(model=folder))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_separate_experts_compute_the_output_of_fused_experts(family):
    """The outputs agree within 1e-6, also if every token is sent to every expert, and if an expert gets no token."""
    block = make_model(family).model.layers[1]
    fused = block.mlp.experts
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    chosen = torch.stack([torch.randperm(3)[:2] for _ in x])  # the last expert is never chosen
    weights = torch.rand(40, 2)
    fused.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = fused(x, chosen, weights)
        gate_up, down = fused.gate_up_proj.detach().clone(), fused.down_proj.detach().clone()
        separate_experts(block, family_of(family).experts)
        for index, expert in enumerate(block.mlp.experts):
            gate, up = gate_up[index].chunk(2)
            parts = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down[index]}
            expert.load_state_dict(parts, assign=True)
        for see_all in (False, True):
            block.mlp.experts.see_all = see_all
            assert torch.allclose(block.mlp.experts(x, chosen, weights), expected, rtol=1e-6, atol=1e-6)


def test_undersampled_experts_are_rounded_to_nearest_and_named_in_a_warning(make_config):
    """Experts that saw fewer than 32 tokens are undersampled."""
    config = make_config("qwen3_moe", num_samples=3)
    _, events = events_of(config)
    reports = [event for event in events if isinstance(event, WindowReport)]
    counts = {path: seen for report in reports for path, seen in report.experts.items()}
    assert list(counts) == [f"model.layers.{index}.mlp.experts" for index in range(4)]
    assert all(sum(seen) == 3 * SEQ_LEN * 2 for seen in counts.values())
    warnings = [event.text for event in events if isinstance(event, RunWarning)]
    for path, seen in counts.items():
        undersampled = [f"mlp.experts.{index}" for index, tokens in enumerate(seen) if tokens < 32]
        block = path.removesuffix(".mlp.experts")
        expected = f"{block}: its 4 experts saw {min(seen)} to {max(seen)} tokens; rounded to nearest: {', '.join(undersampled)}."
        assert bool(undersampled) == any(warning.startswith(expected) for warning in warnings), (seen, warnings)
    assert any(tokens < 32 for seen in counts.values() for tokens in seen)
    assert any(tokens >= 32 for seen in counts.values() for tokens in seen)


def test_calibration_can_send_every_token_to_every_expert(make_config):
    config = make_config("qwen3_moe", num_samples=8, all_experts=True)
    _, events = events_of(config)
    assert not [event for event in events if isinstance(event, RunWarning)]
    for report in (event for event in events if isinstance(event, WindowReport)):
        assert all(tokens == 8 * SEQ_LEN for seen in report.experts.values() for tokens in seen)


def test_a_run_with_too_few_segments_to_hold_some_out_works_with_a_warning(make_config):
    """The stride of the next-token loss is longer than a segment here, which must work too."""
    events = []
    quantize(make_config(num_samples=7, reconstruction={"head_stride": 64}), events.append)
    (warning,) = [event.text for event in events if isinstance(event, RunWarning)]
    assert warning.startswith("7 segments are too few to hold some out")
    assert len([event for event in events if isinstance(event, WindowReport)]) == 3


def test_a_layer_that_is_never_called_stays_in_full_precision_with_the_layer_joined_to_it(make_config, monkeypatch):
    """Some models use the weight of a layer without calling the layer. Inference engines compute gate_proj and up_proj as one layer."""
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x) + x @ self.gate_proj.weight.float().T)
    )
    config = make_config(reconstruction={"rounding": "nearest"})
    with pytest.raises(
        InputError, match=r"only \d+% of the weights of the blocks are in linear layers.*--allow-partial"
    ):
        quantize(config)
    events = []
    out = quantize(config, events.append, allow_partial=True)
    warnings = " ".join(event.text for event in events if isinstance(event, RunWarning))
    assert "because it is never called as a layer: mlp.gate_proj." in warnings
    assert "because it is computed by inference engines as one layer with such a layer: mlp.up_proj." in warnings
    assert {name.rpartition(".")[2] for name in Checkpoint.open(out).infos if "layers.0.mlp" in name} == {
        *("weight", "weight_packed", "weight_scale", "weight_shape")
    }
    names = [name for name in Checkpoint.open(out).infos if name.endswith("weight_packed") and "layers.0.mlp" in name]
    assert names == ["model.layers.0.mlp.down_proj.weight_packed"]


def test_blocks_that_transformers_ignores_are_copied(tmp_path, make_config, monkeypatch):
    """Some checkpoints have further blocks that predict several tokens at once. transformers ignores their tensors by name."""
    folder = save_model(tmp_path / "m", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"config\.json describes 4 blocks, but the weights have 5"):
        quantize(make_config(model=folder))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.4.*"])
    out = quantize(make_config(model=folder))
    assert "model.layers.4.mlp.up_proj.weight" in Checkpoint.open(out).infos


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sizes_that_config_json_leaves_out_are_the_defaults_of_its_class(tmp_path, family):
    """The vocabulary size is removed from config.json. The default of Llama fits the model, the default of Gemma 3 does not."""
    folder = (
        save_model(tmp_path / family, family, vocab_size=32000)
        if family == "llama"
        else save_model(tmp_path / family, family)
    )
    config = json.loads((folder / "config.json").read_text())
    held = config if family == "llama" else config["text_config"]
    del held["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    if family == "llama":
        assert open_model(folder)[0].vocab_size == 32000
    else:
        with pytest.raises(InputError, match=r"shape \[96, 64\], but config.json requires \[26\d+, 64\]"):
            open_model(folder)


def test_routers_are_not_quantized_in_an_untested_family(tmp_path):
    meta_model, _ = open_model(save_model(tmp_path / "m", "olmoe", like="qwen3_moe"))
    assert not [name for name in meta_model.blocks[0].linears if name.rpartition(".")[2] in ("gate", "router")]
    assert "model.layers.0.mlp.gate" in meta_model.never_quantized


def test_short_batches_of_an_expert_are_sampled():
    """Batches have 10 tokens and one token of a hundred is sampled, so most batches contain no sampled token."""
    watched, calls = None, [torch.full((10, 4), float(number)) for number in range(40)]
    for x in calls:
        seen = InputStatistics.of(x, 100, 0 if watched is None else watched.tokens)
        watched = seen if watched is None else watched + seen
    assert watched.sample[:, 0].tolist() == [5.0, 15.0, 25.0, 35.0]  # token 50 of every hundred


@pytest.mark.parametrize("sizes", [[2000], [3] * 200], ids=["one batch", "short batches"])
def test_the_sample_of_an_expert_has_at_most_the_requested_number_of_tokens(sizes):
    layer = QuantizedLinear(nn.Linear(4, 4), Scheme(num_bits=4, group_size=8), Scratch())
    layer.watch_inputs(2, 64)
    for size in sizes:
        layer(torch.randn(size, 4))
    seen = layer.take_statistics()
    assert (len(seen.sample), seen.tokens) == (64, sum(sizes))


def test_more_training_steps_than_16_bit_rounding_values_can_resolve_give_a_warning(make_config):
    config = make_config(num_samples=16, reconstruction={"batch_size": 1, "epochs": 180})
    (warning,) = model_warnings(open_inputs(config, COMPUTE.device, 1))
    assert warning.text.startswith("2,520 steps a window: 16-bit rounding values do not follow such small steps")
    config = replace(config, reconstruction=ReconstructionConfig(epochs=180))
    assert not list(model_warnings(open_inputs(config, COMPUTE.device, 1)))
