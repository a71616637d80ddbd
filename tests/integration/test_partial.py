"""Models of which only a part can be quantized, and weights that vanish: said by `plan`, during the run, at its end and in the card."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbqstream import plan, quantize
from cbqstream.errors import InputError, UsageError
from cbqstream.planning.plan_lines import plan_lines
from cbqstream.records import RunNotice, RunWarning
from tiny import make_model, save_model


@pytest.fixture
def jetmoe(tmp_path):
    """A model whose experts are three-dimensional tensors: linear layers have about 6 % of the weights of its blocks."""
    return save_model(tmp_path / "jetmoe", "jetmoe", like="mixtral", num_key_value_heads=4, kv_channels=16)


def test_a_model_with_few_linear_layers_is_quantized_only_on_request(make_config, jetmoe):
    config = make_config(model=jetmoe, reconstruction={"rounding": "nearest"})
    line = (
        f"{jetmoe}: only 6% of the weights of the blocks are in linear layers; the others, such as"
        " model.layers.0.mlp.input_linear.weight, would stay in full precision. Use --allow-partial to accept that."
    )
    for command in (quantize, plan):
        with pytest.raises(InputError) as caught:
            command(config)
        assert str(caught.value) == line
    assert not config.run_path.exists()
    assert "quantized: 5.9% of the weights of the blocks" in plan_lines(
        plan(config, with_time=False, allow_partial=True)
    )
    events = []
    out = quantize(config, events.append, allow_partial=True)
    assert RunNotice("quantized: 5.9% of the weights of the blocks") in events
    assert "| quantized | blocks 0 to 3, 5.9% of the weights of all blocks |" in (out / "README.md").read_text()


def test_a_run_that_was_allowed_once_is_resumed_without_the_flag(make_config, jetmoe):
    config = make_config(model=jetmoe, reconstruction={"rounding": "nearest"})
    with pytest.raises(Exception, match="stopped after window 1"):
        quantize(config, allow_partial=True, stop_after_window=1)
    assert quantize(config).is_dir()


def test_the_share_counts_layers_that_the_settings_leave_out(make_config):
    """They were left out on request, so they need no flag. Weights: q and o 64 x 64, k and v 64 x 32, and 3 x 64 x 128 of the MLP."""
    config = make_config(ignore=("down_proj",), keep_first=1)
    layers, mlp = 2 * 64 * 64 + 2 * 64 * 32, 64 * 128
    expected = 3 * (layers + 2 * mlp) / (4 * (layers + 3 * mlp))
    assert plan(config, with_time=False).quantized == pytest.approx(expected)


def test_rows_that_vanish_below_the_smallest_scale_are_named(make_config, tmp_path):
    """The smallest scale is 2^-17: a row of weights below half of it is zero after rounding."""
    folder = save_model(tmp_path / "model", dtype=torch.float32, max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:3] *= 1e-6
    tensors["model.layers.2.mlp.up_proj.weight"][:3] = 0
    save_file(tensors, folder / "model.safetensors")
    events = []
    quantize(make_config(model=folder, reconstruction={"rounding": "nearest"}), events.append)
    warnings = [event.text for event in events if isinstance(event, RunWarning) and "smallest scale" in event.text]
    assert warnings == [
        "model.layers.1.mlp.up_proj: 3 of 128 rows are below the smallest scale (2^-17) and became zero."
        " To keep them, use --ignore mlp.up_proj in a new run."
    ]


def test_no_part_of_a_plan_is_negative_if_blocks_differ_in_size(make_config, tmp_path):
    """DeepSeek-V3 has dense blocks, larger blocks of experts, and one more block that predicts further tokens."""
    model = make_model("deepseek_v3", num_nextn_predict_layers=1).to(torch.bfloat16)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    block = {name: value for name, value in tensors.items() if name.startswith("model.layers.3.")}
    tensors |= {name.replace("layers.3.", "layers.4."): value.clone() for name, value in block.items()}
    tensors["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    for keep in (0, 1, 2):
        made = plan(make_config(model=folder, keep_first=keep, keep_last=keep and 1), with_time=False)
        for parts in (made.ram, made.vram, made.disk):
            assert all(size >= 0 for size in parts.values()), parts
        assert made.disk["rest of the model"] > 0
    out = quantize(make_config(model=folder, reconstruction={"rounding": "nearest"}))
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.4.eh_proj" in ignored
    assert "model.layers.4.mlp.experts.0.gate_proj" in ignored


def test_a_plan_checks_out_and_the_dataset(make_config, tmp_path):
    config = make_config(name="full")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match=r"full: exists and is not empty\. Give another OUT\."):
        plan(config, with_time=False)
    assert plan(config, with_time=False, check_out=False).windows == 3
    missing = make_config(dataset=tmp_path / "nothing.txt")
    with pytest.raises(InputError, match=r"nothing\.txt: no such file"):
        plan(missing, with_time=False)
    assert plan(missing, with_time=False, check_dataset=False).windows == 3
