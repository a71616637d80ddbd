"""A whole run on tiny models: what comes out, and who can load it."""

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
    reports = []
    out = quantize(config, lambda event: reports.append(event) if isinstance(event, WindowReport) else None)
    return out, reports


def dequantized_by_compressed_tensors(folder, layer, scheme):
    """`(q - z) * s` with compressed-tensors' own unpacking and nothing of this project."""
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
def test_stored_codes_are_the_evaluated_weights(make_config, name):
    scheme = SCHEMES[name]
    out, _ = run(make_config(scheme=scheme))
    meta_model, source = open_model(out)
    for spec in meta_model.blocks:
        for linear in spec.linears:
            evaluated = source.read(spec.tensors[f"{linear}.weight"], device=CPU)
            assert torch.equal(evaluated, dequantized_by_compressed_tensors(out, f"{spec.prefix}.{linear}", scheme))


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_transformers_loads_the_result_and_agrees(make_config, tokens, family):
    out, _ = run(make_config(family))
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    streamed = streamed_perplexity(out, ids)
    assert streamed == pytest.approx(plain_perplexity(out, ids), rel=1e-4)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", [name for name in SCHEMES if "asymmetric" in name])
def test_transformers_loads_asymmetric_results_dequantized(make_config, tokens, name):
    """Less near than symmetric ones: transformers rounds the dense weights to the dtype of the scales, bf16."""
    out, _ = run(make_config(scheme=SCHEMES[name]))
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    config = CompressedTensorsConfig(dequantize=True)
    plain = plain_perplexity(out, ids, quantization_config=config)
    assert streamed_perplexity(out, ids) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_not_quantized_is_copied_byte_for_byte(make_config, family):
    config = make_config(family)
    (folder := Path(config.model)).joinpath("extra.txt").write_text("kept")
    out, _ = run(config)
    source, result = Checkpoint.open(folder), Checkpoint.open(out)
    meta_model, _ = open_model(folder)
    quantized = {spec.tensors[f"{linear}.weight"] for spec in meta_model.blocks for linear in spec.linears}
    assert len(quantized) == sum(len(spec.linears) for spec in meta_model.blocks)
    for name in source.infos.keys() - quantized:
        assert b"".join(source.raw(name)) == b"".join(result.raw(name)), name
        assert source.infos[name].dtype == result.infos[name].dtype
    assert not quantized & result.infos.keys()
    for file in ("generation_config.json", "extra.txt"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()


def test_shape_of_the_folder(make_config):
    out, reports = run(make_config())
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        *(f"block-{i:05d}.safetensors" for i in range(4)),
        "rest.safetensors",
    ]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert [report.window.index for report in reports] == [0, 1, 2]
    umask = os.umask(0)
    os.umask(umask)
    for path in out.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_kept_blocks_stay_in_full_precision(make_config, tokens):
    config = make_config(keep_first=1, keep_last=1)
    out, reports = run(config)
    assert [(report.window.start, report.window.stop) for report in reports] == [(1, 3)]
    source, result = Checkpoint.open(Path(config.model)), Checkpoint.open(out)
    for index in (0, 3):
        name = f"model.layers.{index}.mlp.up_proj.weight"
        assert torch.equal(source.read(name, device=CPU), result.read(name, device=CPU))
    assert "model.layers.1.mlp.up_proj.weight_packed" in result.infos
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    assert streamed_perplexity(out, ids) == pytest.approx(plain_perplexity(out, ids), rel=1e-4)


@pytest.mark.parametrize("rounding", ["signround", "lora_rounding"])
def test_learning_beats_rounding_to_nearest(make_config, tmp_path, rounding):
    """On the loss of the last window, and on the held-out segments of every window. lora_rounding learns little in so few steps."""
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
def test_any_window(make_config, size, overlap):
    config = make_config(window=WindowConfig(size=size, overlap=overlap), reconstruction={"epochs": 1})
    out, reports = run(config)
    assert len(Checkpoint.open(out).infos) > 0
    assert reports[-1].window.stop == 4


def test_rounding_to_nearest_does_not_depend_on_windows(make_config):
    """With min-max scales nothing of the calibration enters, so any schedule gives the same bytes."""
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


def test_another_seed_is_another_result(make_config):
    first, _ = run(make_config(name="a", scheme=SCHEMES["W2 group asymmetric"]))
    second, _ = run(make_config(name="b", scheme=SCHEMES["W2 group asymmetric"], seed=1))
    assert any(
        (first / f"block-{i:05d}.safetensors").read_bytes() != (second / f"block-{i:05d}.safetensors").read_bytes()
        for i in range(4)
    )


@pytest.mark.parametrize("mode", ["signround", "lora_rounding"])
def test_what_is_taken_back_is_as_the_window_found_it(make_config, monkeypatch, mode):
    """Blocks that are new, and those that the window before carried over, with folds and step sizes of inputs."""
    real, judged = pipeline.reconstruct, itertools.count()

    def reconstruct_and_compare(blocks, *more):
        before = {block.index: {name: value.clone() for name, value in block.carry().items()} for block in blocks}
        result = real(blocks, *more)
        assert result.reverted == "held-out loss increased"
        for block in blocks:
            after = block.carry()
            assert after.keys() == before[block.index].keys()
            assert all(torch.equal(after[name], value) for name, value in before[block.index].items())
        return result

    def let_the_first_window_learn(*arguments):
        number = next(judged)
        return 1 / (1 + number) if number < 2 else float(number)

    def only_later_windows(blocks, *more):
        return (real if blocks[0].index == 0 else reconstruct_and_compare)(blocks, *more)

    monkeypatch.setattr(reconstruct, "hard_loss", let_the_first_window_learn)
    monkeypatch.setattr(pipeline, "reconstruct", only_later_windows)
    scheme = Scheme(num_bits=2, group_size=16, activation_bits=8, activation_strategy="tensor")
    _, reports = run(make_config(scheme=scheme, reconstruction={"rounding": mode}))
    assert [report.reverted for report in reports] == [None, "held-out loss increased", "held-out loss increased"]


def test_memory_beyond_the_limit_is_told(make_config, monkeypatch):
    told = []
    monkeypatch.setattr(
        inputs, "fitting_plan", lambda *given: fitting_plan(replace(given[0], max_ram=None), *given[1:])
    )
    quantize(replace(make_config(), max_ram=100 << 20), told.append)
    warnings = [event.text for event in told if isinstance(event, RunWarning)]
    assert len(warnings) == 3
    assert re.fullmatch(r"memory: \d\.\d\d GiB were taken, --max-ram is 0\.10; the plan was too low\.", warnings[0])


ACTIVATION_SCHEMES = {
    "W8A8 channel": Scheme(num_bits=8, group_size=None, activation_bits=8),
    "W4A8 group": Scheme(num_bits=4, group_size=32, activation_bits=8),
    "W4A4 group": Scheme(num_bits=4, group_size=32, activation_bits=4),
    "W4A8 group, learned step": Scheme(num_bits=4, group_size=32, activation_bits=8, activation_strategy="tensor"),
}


@pytest.mark.parametrize("name", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_quantizes_activations_as_the_streamed_evaluation_does(make_config, tokens, family, name):
    out, _ = run(make_config(family, scheme=ACTIVATION_SCHEMES[name], keep_last=1))
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    meta_model, source = open_model(out)
    streamed = streamed_perplexity(out, ids)
    assert streamed == pytest.approx(plain_perplexity(out, ids), rel=1e-4)
    first, last = (meta_model.blocks[index].tensors["mlp.up_proj.weight"] for index in (0, 3))
    assert source.input_quantizer(first) is not None
    assert source.input_quantizer(last) is None


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_folded_norms_are_exported(with_outliers, make_config, tokens, family):
    """At 8 bits next to nothing is lost, so a fold that is not exported with what it belongs to would show."""
    model = with_outliers(family)
    scheme = Scheme(num_bits=8, group_size=8)
    outliers = TransformConfig(activations="always", variant="paper", weights=False)
    config = make_config(family, model=model, scheme=scheme, outliers=outliers, reconstruction={"epochs": 1})
    out, _ = run(config)
    source, result = Checkpoint.open(model), Checkpoint.open(out)
    meta_model, _ = open_model(model)
    norm = meta_model.blocks[2].tensors[f"{meta_model.folds(2)[0].writer}.weight"]
    ratio = source.read(norm, device=CPU).float() / result.read(norm, device=CPU).float()
    assert ratio[7] > 1
    assert torch.equal(ratio.log2(), ratio.log2().round())
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    streamed = streamed_perplexity(out, ids)
    assert streamed == pytest.approx(plain_perplexity(out, ids), rel=1e-4)
    assert streamed == pytest.approx(streamed_perplexity(model, ids), rel=0.02)


@pytest.mark.parametrize("scheme", ["W4A16", "W2A16", "W8A8", "W4A8", "W4A4"])
@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_and_scheme(make_config, name, scheme):
    """No window ends worse than it began, whatever the settings."""
    profile = PROFILES[name]
    config = replace(
        make_config(scheme=Scheme.named(scheme, group_size=32), keep_last=1),
        window=profile.window,
        outliers=profile.outliers,
        reconstruction=replace(profile.reconstruction, epochs=min(profile.reconstruction.epochs, 2)),
    )
    _, reports = run(config)
    assert len(reports) == 2
    for report in reports:
        assert 0 < report.loss_after <= report.loss_before


def test_the_last_window_looks_at_the_predictions(make_config, tokens):
    """Only the blocks of the last window differ, and the divergence of the predictions is part of its loss."""
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
