"""Whole runs on tiny models: the files of the result, and its evaluation by this project and by transformers."""

import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig

from cbqstream import quantize
from cbqstream.calibration.segments import load_segments
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.config import TransformConfig, WindowConfig
from cbqstream.evaluation.model import open_model
from cbqstream.planning import advice
from cbqstream.planning.plan import fitting_plan
from cbqstream.profiles import PROFILES
from cbqstream.records import RunWarning, WindowReport
from cbqstream.run import inputs, pipeline
from cbqstream.scheme import Scheme
from cbqstream.windows import reconstruct
from perplexities import plain_perplexity, streamed_perplexity
from tiny import SEQ_LEN, SOME_FAMILIES, VOCAB, save_tokens

CPU = torch.device("cpu")

SCHEMES = {
    "W4 group symmetric": Scheme(num_bits=4, group_size=32),
    "W4 channel symmetric": Scheme(num_bits=4, group_size=None),
    "W3 group symmetric": Scheme(num_bits=3, group_size=16),
    "W2 group symmetric": Scheme(num_bits=2, group_size=8),
    "W8 channel symmetric": Scheme(num_bits=8, group_size=None),
    "W4 group asymmetric": Scheme(num_bits=4, group_size=32, symmetric=False),
    "W3 channel asymmetric": Scheme(num_bits=3, group_size=None, symmetric=False),
    "W2 group asymmetric": Scheme(num_bits=2, group_size=16, symmetric=False),
}


def run(config):
    """Quantize, and return the folder of the result and the reports of the windows."""
    reports = []
    out = quantize(config, lambda event: reports.append(event) if isinstance(event, WindowReport) else None)
    return out, reports


def dequantized_by_compressed_tensors(folder, layer, scheme):
    """Weight `(q - z) * s` of a layer, unpacked by compressed-tensors without code of this project."""
    weights = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= {
            key.rpartition(".")[2]: value for key, value in load_file(shard).items() if key.startswith(f"{layer}.")
        }
    shape = torch.Size(weights["weight_shape"].tolist())
    codes = unpack_from_int32(weights["weight_packed"], scheme.num_bits, shape).float()
    scale = weights["weight_scale"].float()
    columns = shape[1] // scale.shape[1]
    zero = torch.zeros_like(scale)
    if not scheme.symmetric:
        zero = unpack_from_int32(weights["weight_zero_point"], scheme.num_bits, scale.shape, packed_dim=0).float()
    return (codes - zero.repeat_interleave(columns, 1)) * scale.repeat_interleave(columns, 1)


@pytest.mark.parametrize("name", SCHEMES)
def test_evaluated_weights_equal_those_that_compressed_tensors_unpacks(make_config, name):
    scheme = SCHEMES[name]
    out, _ = run(make_config(scheme=scheme))
    meta_model, source = open_model(out)
    for spec in meta_model.blocks:
        for linear in spec.linears:
            evaluated = source.read(spec.tensors[f"{linear}.weight"], device=CPU)
            assert torch.equal(evaluated, dequantized_by_compressed_tensors(out, f"{spec.prefix}.{linear}", scheme))


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_transformers_loads_the_result_and_gives_the_same_perplexity(make_config, tokens, family):
    out, _ = run(make_config(family))
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    streamed = streamed_perplexity(out, ids)
    assert streamed == pytest.approx(plain_perplexity(out, ids), rel=1e-4)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", [name for name in SCHEMES if "asymmetric" in name])
def test_transformers_loads_an_asymmetric_result_with_dequantize_and_gives_the_same_perplexity(
    make_config, tokens, name
):
    """The tolerance is larger than for symmetric schemes: transformers rounds the dense weights to bf16, the dtype of the scales."""
    out, _ = run(make_config(scheme=SCHEMES[name]))
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    config = CompressedTensorsConfig(dequantize=True)
    plain = plain_perplexity(out, ids, quantization_config=config)
    assert streamed_perplexity(out, ids) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tensors_and_files_that_are_not_quantized_are_copied_byte_for_byte(make_config, family):
    config = make_config(family)
    (folder := Path(config.model)).joinpath("extra.txt").write_text("kept")
    out, _ = run(config)
    source, result = Checkpoint.open(folder), Checkpoint.open(out)
    meta_model, _ = open_model(folder)
    quantized = {spec.tensors[f"{linear}.weight"] for spec in meta_model.blocks for linear in spec.linears}
    assert len(quantized) == sum(len(spec.linears) for spec in meta_model.blocks)
    for name in source.infos.keys() - quantized:
        assert b"".join(source.raw(source.infos[name])) == b"".join(result.raw(result.infos[name])), name
        assert source.infos[name].dtype == result.infos[name].dtype
    assert not quantized & result.infos.keys()
    for file in ("generation_config.json", "extra.txt"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()


def test_the_result_has_one_shard_per_block_an_index_and_a_quantization_config(make_config):
    """Its files have the permissions that the umask gives to new files."""
    out, reports = run(make_config())
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        *(f"block-{i:05d}.safetensors" for i in range(4)),
        "rest.safetensors",
    ]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert [report.index for report in reports] == [0, 1, 2]
    umask = os.umask(0)
    os.umask(umask)
    for path in out.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_blocks_kept_by_keep_first_and_keep_last_stay_in_full_precision(make_config, tokens):
    config = make_config(keep_first=1, keep_last=1)
    out, reports = run(config)
    assert [(report.start, report.stop) for report in reports] == [(1, 3)]
    source, result = Checkpoint.open(Path(config.model)), Checkpoint.open(out)
    for index in (0, 3):
        name = f"model.layers.{index}.mlp.up_proj.weight"
        assert torch.equal(source.read(name, device=CPU), result.read(name, device=CPU))
    assert "model.layers.1.mlp.up_proj.weight_packed" in result.infos
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    assert streamed_perplexity(out, ids) == pytest.approx(plain_perplexity(out, ids), rel=1e-4)


@pytest.mark.parametrize("rounding", ["signround", "lora_rounding"])
def test_training_gives_a_smaller_loss_than_rounding_to_nearest(make_config, tmp_path, rounding):
    """The loss on held-out segments grows in no window, and in the last one it is below that of rounding to nearest.

    With signround it is at least 10 % below; lora_rounding changes little in so few steps.
    """
    options = {
        "scheme": Scheme(num_bits=2, group_size=16, symmetric=False),
        "dataset": save_tokens(tmp_path / "many.npy", 64 * SEQ_LEN),
        "num_samples": 64,
    }
    _, reports = run(
        make_config(name="learned", reconstruction={"rounding": rounding, "epochs": 6, "head_weight": 0.0}, **options)
    )
    _, nearest = run(make_config(name="nearest", reconstruction={"rounding": "nearest"}, **options))
    assert all(report.loss_after <= report.loss_before for report in reports)
    assert any(report.changed > 0.01 for report in reports)
    assert all(report.changed == 0 and report.loss_after == report.loss_before for report in nearest)
    assert reports[-1].loss_after < (0.9 if rounding == "signround" else 1) * nearest[-1].loss_after


@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (2, 0), (3, 1), (3, 2), (4, 3), (9, 8)])
def test_every_size_and_overlap_of_windows_quantizes_all_blocks(make_config, size, overlap):
    config = make_config(window=WindowConfig(size=size, overlap=overlap), reconstruction={"epochs": 1})
    out, reports = run(config)
    assert len(Checkpoint.open(out).infos) > 0
    assert reports[-1].stop == 4


def test_rounding_to_nearest_does_not_depend_on_the_windows(make_config):
    """With min-max scales, the result does not depend on the calibration, so all window sizes give identical bytes."""
    plain = {"rounding": "nearest", "init": "minmax"}
    first, _ = run(make_config(name="a", reconstruction=plain))
    second, _ = run(make_config(name="b", reconstruction=plain, window=WindowConfig(size=3, overlap=0)))
    for path in sorted(first.glob("block-*.safetensors")):
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_two_runs_are_byte_identical(make_config):
    first, _ = run(make_config(name="a"))
    second, _ = run(make_config(name="b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_seed_gives_another_result(make_config):
    first, _ = run(make_config(name="a", scheme=SCHEMES["W2 group asymmetric"]))
    second, _ = run(make_config(name="b", scheme=SCHEMES["W2 group asymmetric"], seed=1))
    assert any(
        (first / f"block-{i:05d}.safetensors").read_bytes() != (second / f"block-{i:05d}.safetensors").read_bytes()
        for i in range(4)
    )


@pytest.mark.parametrize("rounding", ["signround", "lora_rounding"])
def test_a_window_whose_loss_increases_is_reverted_to_its_state_before_training(make_config, monkeypatch, rounding):
    """New blocks, and blocks that continue from a window state, are restored, with smoothing and learned input steps."""
    real, calls = pipeline.reconstruct, itertools.count()

    def reconstruct_and_compare(blocks, *more):
        before = {
            block.index: {name: value.clone() for name, value in block.window_state().items()} for block in blocks
        }
        result = real(blocks, *more)
        assert result.reverted == "held-out loss increased"
        for block in blocks:
            after = block.window_state()
            assert after.keys() == before[block.index].keys()
            assert all(torch.equal(after[name], value) for name, value in before[block.index].items())
        return result

    def loss_that_decreases_only_in_the_first_window(*arguments):
        number = next(calls)
        return 1 / (1 + number) if number < 2 else float(number)

    def only_later_windows(blocks, *more):
        return (real if blocks[0].index == 0 else reconstruct_and_compare)(blocks, *more)

    monkeypatch.setattr(reconstruct, "hard_loss", loss_that_decreases_only_in_the_first_window)
    monkeypatch.setattr(pipeline, "reconstruct", only_later_windows)
    scheme = Scheme(num_bits=2, group_size=16, activation_bits=8, activation_strategy="tensor")
    _, reports = run(make_config(scheme=scheme, reconstruction={"rounding": rounding}))
    assert [report.reverted for report in reports] == [None, "held-out loss increased", "held-out loss increased"]


def test_every_window_that_uses_more_memory_than_max_ram_gives_a_warning(make_config, monkeypatch):
    events = []
    monkeypatch.setattr(
        inputs, "fitting_plan", lambda *given: fitting_plan(replace(given[0], max_ram=None), *given[1:])
    )
    quantize(make_config(max_ram=100 << 20), events.append)
    warnings = [event.text for event in events if isinstance(event, RunWarning)]
    assert len(warnings) == 3
    assert re.fullmatch(r"memory: \d\.\d\d GiB were used, but --max-ram is 0\.10; the plan was too low\.", warnings[0])


def test_absurd_disk_traffic_gives_a_warning_with_a_setting_that_cuts_it(make_config, monkeypatch):
    """Every setting counts as one that helps, so the first is named."""
    monkeypatch.setattr(advice, "_ABSURD", 0)
    monkeypatch.setattr(advice, "_LEAST", 0)
    monkeypatch.setattr(advice, "_CUT", 0)
    events = []
    quantize(make_config(), events.append)
    (warning,) = (event.text for event in events if isinstance(event, RunWarning) and "times its source" in event.text)
    assert warning.startswith("this run reads 0.00 TB from disk, ")
    assert "With --batch-size " in warning


ACTIVATION_SCHEMES = {
    "W8A8 channel": Scheme(num_bits=8, group_size=None, activation_bits=8),
    "W8A8 channel asymmetric": Scheme(num_bits=8, group_size=None, activation_bits=8, symmetric=False),
    "W8A8 group": Scheme(num_bits=8, group_size=32, activation_bits=8),
    "W4A8 group": Scheme(num_bits=4, group_size=32, activation_bits=8),
    "W4A4 group": Scheme(num_bits=4, group_size=32, activation_bits=4),
    "W4A8 group, learned step": Scheme(num_bits=4, group_size=32, activation_bits=8, activation_strategy="tensor"),
}


@pytest.mark.parametrize("name", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_quantizes_inputs_as_the_streamed_evaluation_does(make_config, tokens, family, name):
    out, _ = run(make_config(family, scheme=ACTIVATION_SCHEMES[name], keep_last=1))
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    meta_model, source = open_model(out)
    streamed = streamed_perplexity(out, ids)
    assert streamed == pytest.approx(plain_perplexity(out, ids), rel=1e-4)
    first, last = (meta_model.blocks[index].tensors["mlp.up_proj.weight"] for index in (0, 3))
    assert source.input_quantizer(first) is not None
    assert source.input_quantizer(last) is None


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_smoothed_norms_are_exported_together_with_the_layers_that_balance_them(
    with_outliers, make_config, tokens, family
):
    """At 8 bits the result has the perplexity of the source. If only one layer of a smoothing pair were exported, it would not."""
    model = with_outliers(family)
    scheme = Scheme(num_bits=8, group_size=8)
    transforms = TransformConfig(smoothing="always", smoothing_rule="paper", truncate_weights=False)
    config = make_config(family, model=model, scheme=scheme, transforms=transforms, reconstruction={"epochs": 1})
    out, _ = run(config)
    source, result = Checkpoint.open(model), Checkpoint.open(out)
    meta_model, _ = open_model(model)
    norm = meta_model.blocks[2].tensors[f"{meta_model.smoothing_pairs(2)[0].smooth_layer}.weight"]
    ratio = source.read(norm, device=CPU).float() / result.read(norm, device=CPU).float()
    assert ratio[7] > 1
    assert torch.equal(ratio.log2(), ratio.log2().round())
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    streamed = streamed_perplexity(out, ids)
    assert streamed == pytest.approx(plain_perplexity(out, ids), rel=1e-4)
    assert streamed == pytest.approx(streamed_perplexity(model, ids), rel=0.02)


@pytest.mark.parametrize("scheme", ["W4A16", "W2A16", "W8A8", "W4A8", "W4A4"])
@pytest.mark.parametrize("name", PROFILES)
def test_the_loss_increases_in_no_window_with_any_profile_and_scheme(make_config, name, scheme):
    profile = PROFILES[name]
    config = replace(
        make_config(scheme=Scheme.named(scheme, group_size=32), keep_last=1),
        window=profile.window,
        transforms=profile.transforms,
        reconstruction=replace(profile.reconstruction, epochs=min(profile.reconstruction.epochs, 2)),
    )
    _, reports = run(config)
    assert len(reports) == (3 if profile.window.size == 1 else 2)
    for report in reports:
        assert 0 < report.loss_after <= report.loss_before


def test_head_weight_adds_the_divergence_of_predictions_to_the_loss_of_the_last_window(make_config, tokens):
    """Only the blocks of the last window depend on it."""
    scheme = Scheme(num_bits=2, group_size=16, symmetric=False)
    without, plain = run(make_config(name="without", scheme=scheme, reconstruction={"head_weight": 0.0}))
    with_head, reports = run(make_config(name="with", scheme=scheme, reconstruction={"head_weight": 1.0}))
    same = [
        (without / f"block-{i:05d}.safetensors").read_bytes() == (with_head / f"block-{i:05d}.safetensors").read_bytes()
        for i in range(4)
    ]
    assert same == [True, True, False, False]
    assert reports[-1].loss_before > plain[-1].loss_before
    assert reports[0].loss_after == plain[0].loss_after
