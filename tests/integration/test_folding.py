"""Rescaling outlier channels changes nothing that a block computes, and what is exported knows of it."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from cbqstream.windows.resident import BlockSettings, ResidentBlock, run_blocks
from hypothesis import given
from hypothesis import strategies as st

from cbqstream import quantize
from cbqstream.config import ReconstructionConfig, TransformConfig
from cbqstream.evaluation.model import open_model
from cbqstream.models.block import build_block, run_block
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.numerics.affine import SMALLEST_SCALE, grouped, num_groups
from cbqstream.records import Compute
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.transforms.smoothing import apply_fold, fold_scale, parameters_of
from cbqstream.windows.quantized_linear import Phase, replace_linears
from tiny import FAMILIES, SEQ_LEN, SOME_FAMILIES, VOCAB, save_model

CPU = Compute(torch.device("cpu"), torch.float32, 2)
SCHEME = Scheme(num_bits=4, group_size=32)


def resident(meta_model, source, arguments, index=1, scheme=SCHEME):
    module = build_block(meta_model, index, source, device=CPU.device, dtype=CPU.dtype, linear_dtype=None)
    layers = replace_linears(module, dict.fromkeys(meta_model.blocks[index].linears, scheme), Scratch())
    return ResidentBlock(index, module, arguments[index], layers, meta_model.folds(index))


@cache
def opened(folder):
    meta_model, source = open_model(folder)
    ids = torch.randint(0, VOCAB, (SEQ_LEN,), generator=torch.Generator().manual_seed(0))
    with load_embedding_and_head(meta_model, source, device=CPU.device, dtype=CPU.dtype) as outer:
        return meta_model, source, outer.block_arguments(ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**31))
def test_a_folded_block_computes_the_same(tiny_models, family, seed):
    meta_model, source, arguments = opened(tiny_models[family])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, SEQ_LEN, meta_model.hidden_size, generator=generator)
    plain = run_blocks([resident(meta_model, source, arguments)], x, Phase.ORIGINAL)
    block = resident(meta_model, source, arguments)
    assert meta_model.folds(1)
    for fold in meta_model.folds(1):
        channels = parameters_of(block.module.get_submodule(fold.writer))["weight"].shape[0]
        scale = torch.exp2(torch.randint(-2, 6, (channels,), generator=generator).float())
        before = parameters_of(block.module.get_submodule(fold.writer))["weight"].clone()
        apply_fold(block.module, fold, scale)
        assert not torch.equal(before, parameters_of(block.module.get_submodule(fold.writer))["weight"])
    assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_block_that_only_computes_has_the_bits_of_one_in_a_window(tiny_models, family, monkeypatch):
    """Else streams that were lost could not be made again. Layers are cut into slabs of rows, as windows cut large ones."""
    monkeypatch.setattr("cbqstream.numerics.slabs.SLAB_WEIGHTS", 700)
    meta_model, source, arguments = opened(tiny_models[family])
    x = torch.randn(8, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = run_blocks([resident(meta_model, source, arguments)], x, Phase.ORIGINAL)
    module = build_block(meta_model, 1, source, device=CPU.device, dtype=CPU.dtype, linear_dtype=CPU.dtype)
    assert {type(module.get_submodule(name)).__name__ for name in meta_model.blocks[1].linears} == {"_LinearInSlabs"}
    assert torch.equal(run_block(module, x, arguments[1]), expected)


def test_norms_that_the_residual_reads_are_not_folded(tmp_path):
    folder = save_model(tmp_path / "opt", "opt", do_layer_norm_before=False)
    assert [fold.writer for fold in open_model(folder)[0].folds(1)] == ["self_attn.v_proj", "fc1"]
    folder = save_model(tmp_path / "gelu", "opt", activation_function="gelu")
    assert "fc1" not in [fold.writer for fold in open_model(folder)[0].folds(1)]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_outliers_are_found_and_folded(tiny_models, family):
    """A channel of the first norm is made 64 times as large; the scale of its input is the root of what stands out."""
    meta_model, source, arguments = opened(tiny_models[family])
    block = resident(meta_model, source, arguments)
    writer = meta_model.folds(1)[0].writer
    for value in parameters_of(block.module.get_submodule(writer)).values():
        value[5] *= 64
    x = torch.randn(4, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = run_blocks([block], x, Phase.ORIGINAL)
    settings = BlockSettings(SCHEME, ReconstructionConfig(), TransformConfig(activations="always", variant="paper"))
    block.watch_inputs(x.shape[0] * x.shape[1], settings)
    run_blocks([block], x, Phase.ORIGINAL)
    block.start(settings, torch.Generator())
    scale = block.scales[writer]
    assert scale[5] in (4, 8)
    assert (scale != 1).sum() < 4
    assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)
    assert set(block.rescaled()) == {
        f"{written}.{name}"
        for written in block.scales
        for name in parameters_of(block.module.get_submodule(written))
        if f"{written}" not in block.layers or name == "bias"
    }


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_searched_scales_make_four_bit_inputs_cheaper(tiny_models, family):
    """The block still computes the same in full precision, and with 4-bit weights and inputs its error is less than half."""
    meta_model, source, arguments = opened(tiny_models[family])
    scheme = Scheme(num_bits=4, group_size=8, activation_bits=4)
    x = torch.randn(8, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    errors = {}
    for when in ("never", "always"):
        block = resident(meta_model, source, arguments, scheme=scheme)
        for fold in meta_model.folds(1):
            channels = parameters_of(block.module.get_submodule(fold.writer))["weight"].shape[0]
            outlying = torch.where(torch.arange(channels) % 7 == 0, 2.0**-5, 1.0)
            # large inputs that small weights read, as trained models have them
            apply_fold(block.module, fold, outlying)
        plain = run_blocks([block], x, Phase.ORIGINAL)
        settings = BlockSettings(scheme, ReconstructionConfig(), TransformConfig(activations=when, variant="search"))
        block.watch_inputs(x.shape[0] * x.shape[1], settings)
        run_blocks([block], x, Phase.ORIGINAL)
        block.start(settings, torch.Generator())
        assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)
        errors[when] = (run_blocks([block], x, Phase.HARD) - plain).square().mean()
    assert errors["always"] < 0.5 * errors["never"]


def watched(block, x, settings):
    """The statistics of the inputs of every layer."""
    block.watch_inputs(x.shape[0] * x.shape[1], settings)
    run_blocks([block], x, Phase.ORIGINAL)
    return {name: layer.take_statistics() for name, layer in block.layers.items()}


@pytest.mark.parametrize("group_size", [8, None])
def test_a_writer_is_divided_no_further_than_its_step_sizes_can_be_stored(tiny_models, group_size):
    """At 8 bits a division by 2^8 would leave small rows a step below 2^-17, and so with fewer codes."""
    meta_model, source, arguments = opened(tiny_models["llama"])
    scheme = Scheme(num_bits=8, group_size=group_size, activation_bits=8)
    block = resident(meta_model, source, arguments, scheme=scheme)
    fold = next(fold for fold in meta_model.folds(1) if fold.writer == "mlp.up_proj")
    weight = block.layers[fold.writer].weight
    weight.mul_(2.0 ** -(torch.arange(len(weight)) % 12).view(-1, 1))
    x = torch.randn(8, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    settings = BlockSettings(scheme, ReconstructionConfig(), TransformConfig(activations="always"))
    seen = watched(block, x, settings)[fold.readers[0]]
    seen = seen.divided(torch.exp2(-20.0 * (torch.arange(len(weight)) % 12 == 11)))
    step = grouped(weight, num_groups(weight.shape[1], group_size)).abs().amax(-1).float().amin(1) * 2 / 255
    readers = dict.fromkeys(fold.readers, scheme)
    for variant in ("paper", "huawei", "search"):
        config = TransformConfig(activations="always", variant=variant)
        free = fold_scale(block.module, fold, seen, readers, config)
        scale = fold_scale(block.module, fold, seen, {**readers, fold.writer: scheme}, config)
        assert ((free > 1) & (step / free < SMALLEST_SCALE)).any()
        assert ((scale <= 1) | (step / scale >= SMALLEST_SCALE)).all()


def test_few_tokens_rescale_nothing(tiny_models):
    meta_model, source, arguments = opened(tiny_models["llama"])
    scheme = Scheme(num_bits=4, group_size=8, activation_bits=4)
    block = resident(meta_model, source, arguments, scheme=scheme)
    x = torch.randn(8, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 100
    settings = BlockSettings(scheme, ReconstructionConfig(), TransformConfig(activations="always"))
    statistics = watched(block, x, settings)
    fold = next(fold for fold in meta_model.folds(1) if fold.writer == "mlp.up_proj")
    schemes, seen = dict.fromkeys(block.layers, scheme), statistics[fold.readers[0]]
    assert len(seen.sample) == 128
    assert (fold_scale(block.module, fold, seen, schemes, settings.outliers) != 1).any()
    few = replace(seen, sample=seen.sample[:100])
    assert (fold_scale(block.module, fold, few, schemes, settings.outliers) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_folded_norms_keep_every_digit_whatever_computes(make_config, with_outliers, monkeypatch, dtype):
    """As on CUDA, where blocks compute in bf16: what is stored is the original divided by a power of two."""
    monkeypatch.setattr("cbqstream.run.inputs.compute_dtype", lambda device: torch.bfloat16)
    folder, rule = with_outliers("llama", dtype), TransformConfig(activations="always", variant="paper")
    out = quantize(make_config(model=folder, outliers=rule, reconstruction={"rounding": "nearest"}))
    (_, before), (_, after) = open_model(folder), open_model(out)
    name = "model.layers.1.input_layernorm.weight"
    divided = before.read(name, device=CPU.device).float() / after.read(name, device=CPU.device).float()
    assert (divided != 1).any()
    assert torch.equal(divided.log2(), divided.log2().round())
