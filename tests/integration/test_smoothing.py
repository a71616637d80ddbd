"""Smoothing: rescaling the channels of a block does not change what the block computes, and the rescaled tensors are exported."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbqstream import quantize
from cbqstream.config import ReconstructionConfig, TransformConfig
from cbqstream.evaluation.model import open_model
from cbqstream.models.block import SlabLinear, build_block, run_block
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.numerics.affine import SMALLEST_SCALE, grouped, num_groups
from cbqstream.records import Compute
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.transforms.smoothing import parameters_of, smooth, smoothing_scale
from cbqstream.windows.quantized_linear import Phase, replace_linears
from cbqstream.windows.resident_block import BlockSettings, ResidentBlock, run_blocks
from tiny import FAMILIES, SEQ_LEN, SOME_FAMILIES, VOCAB, save_model

CPU = Compute(torch.device("cpu"), torch.float32, 2)
SCHEME = Scheme(num_bits=4, group_size=32)


def resident(meta_model, source, arguments, index=1, scheme=SCHEME):
    """A block in memory, with all its linear layers quantized with `scheme` and all its smoothing pairs."""
    module = build_block(meta_model, index, source, device=CPU.device, dtype=CPU.dtype, linear_dtype=None)
    layers = replace_linears(module, dict.fromkeys(meta_model.blocks[index].linears, scheme), Scratch())
    return ResidentBlock(index, module, arguments[index], layers, meta_model.smoothing_pairs(index))


@cache
def opened(folder):
    """Meta model, tensors and block arguments of a checkpoint."""
    meta_model, source = open_model(folder)
    ids = torch.randint(0, VOCAB, (SEQ_LEN,), generator=torch.Generator().manual_seed(0))
    with load_embedding_and_head(meta_model, source, device=CPU.device, dtype=CPU.dtype) as outer:
        return meta_model, source, outer.block_arguments(ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**31))
def test_smoothing_does_not_change_the_output_of_a_block(tiny_models, family, seed):
    """Every smoothing pair is rescaled by random powers of two, and the output is identical to the last bit."""
    meta_model, source, arguments = opened(tiny_models[family])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, SEQ_LEN, meta_model.hidden_size, generator=generator)
    plain = run_blocks([resident(meta_model, source, arguments)], x, Phase.ORIGINAL)
    block = resident(meta_model, source, arguments)
    assert meta_model.smoothing_pairs(1)
    for pair in meta_model.smoothing_pairs(1):
        channels = parameters_of(block.module.get_submodule(pair.smooth_layer))["weight"].shape[0]
        scale = torch.exp2(torch.randint(-2, 6, (channels,), generator=generator).float())
        before = parameters_of(block.module.get_submodule(pair.smooth_layer))["weight"].clone()
        smooth(block.module, pair, scale)
        assert not torch.equal(before, parameters_of(block.module.get_submodule(pair.smooth_layer))["weight"])
    assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_block_that_only_computes_gives_the_same_bits_as_a_block_in_a_window(tiny_models, family, monkeypatch):
    """If the bits differed, lost streams could not be recomputed. Layers are multiplied in slabs of rows, as large layers of a run are."""
    monkeypatch.setattr("cbqstream.numerics.slabs.SLAB_WEIGHTS", 700)
    meta_model, source, arguments = opened(tiny_models[family])
    x = torch.randn(8, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = run_blocks([resident(meta_model, source, arguments)], x, Phase.ORIGINAL)
    module = build_block(meta_model, 1, source, device=CPU.device, dtype=CPU.dtype, linear_dtype=CPU.dtype)
    assert {type(module.get_submodule(name)) for name in meta_model.blocks[1].linears} == {SlabLinear}
    assert torch.equal(run_block(module, x, arguments[1]), expected)


def test_norms_whose_output_the_residual_adds_are_not_smoothed(tmp_path):
    """OPT with norms after the residual has only the pairs of v_proj and fc1, and without ReLU only that of v_proj."""
    folder = save_model(tmp_path / "opt", "opt", do_layer_norm_before=False)
    smooth_layers = [pair.smooth_layer for pair in open_model(folder)[0].smoothing_pairs(1)]
    assert smooth_layers == ["self_attn.v_proj", "fc1"]
    folder = save_model(tmp_path / "gelu", "opt", activation_function="gelu")
    assert "fc1" not in [pair.smooth_layer for pair in open_model(folder)[0].smoothing_pairs(1)]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_rule_paper_finds_the_outlier_channel_of_a_norm_and_smooths_it(tiny_models, family):
    """A channel of the first norm is made 64 times as large. Its scale is the root of its size relative to the other channels: 4 or 8."""
    meta_model, source, arguments = opened(tiny_models[family])
    block = resident(meta_model, source, arguments)
    smooth_layer = meta_model.smoothing_pairs(1)[0].smooth_layer
    for value in parameters_of(block.module.get_submodule(smooth_layer)).values():
        value[5] *= 64
    x = torch.randn(4, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = run_blocks([block], x, Phase.ORIGINAL)
    transforms = TransformConfig(smoothing="always", smoothing_rule="paper")
    settings = BlockSettings(SCHEME, ReconstructionConfig(), transforms)
    block.watch_inputs(x.shape[0] * x.shape[1], settings)
    run_blocks([block], x, Phase.ORIGINAL)
    block.start(settings, torch.Generator())
    scale = block.found["smoothing"][smooth_layer]
    assert scale[5] in (4, 8)
    assert (scale != 1).sum() < 4
    assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)
    original = {name: source.read(path, device=CPU.device) for name, path in meta_model.blocks[1].tensors.items()}
    assert {name for name, value in original.items() if block.stored(name, value) is not value} == {
        f"{layer}.{name}"
        for layer in block.found["smoothing"]
        for name in parameters_of(block.module.get_submodule(layer))
        if layer not in block.layers or name == "bias"  # quantized weights are stored as codes
    }


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_rule_search_halves_the_error_of_a_block_with_four_bit_weights_and_inputs(tiny_models, family):
    """In full precision, the output of the block does not change by a bit."""
    meta_model, source, arguments = opened(tiny_models[family])
    scheme = Scheme(num_bits=4, group_size=8, activation_bits=4)
    x = torch.randn(8, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    errors = {}
    for when in ("never", "always"):
        block = resident(meta_model, source, arguments, scheme=scheme)
        for pair in meta_model.smoothing_pairs(1):
            channels = parameters_of(block.module.get_submodule(pair.smooth_layer))["weight"].shape[0]
            outlying = torch.where(torch.arange(channels) % 7 == 0, 2.0**-5, 1.0)
            # some channels become large and are read by small weights, as in trained models
            smooth(block.module, pair, outlying)
        plain = run_blocks([block], x, Phase.ORIGINAL)
        transforms = TransformConfig(smoothing=when, smoothing_rule="search")
        settings = BlockSettings(scheme, ReconstructionConfig(), transforms)
        block.watch_inputs(x.shape[0] * x.shape[1], settings)
        run_blocks([block], x, Phase.ORIGINAL)
        block.start(settings, torch.Generator())
        assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)
        errors[when] = (run_blocks([block], x, Phase.HARD) - plain).square().mean()
    assert errors["always"] < 0.5 * errors["never"]


def watched(block, x, settings):
    """Statistics of the inputs of every layer of a block on `x`."""
    block.watch_inputs(x.shape[0] * x.shape[1], settings)
    run_blocks([block], x, Phase.ORIGINAL)
    return {name: layer.take_statistics() for name, layer in block.layers.items()}


@pytest.mark.parametrize("group_size", [8, None])
def test_a_smoothed_layer_is_divided_no_further_than_its_step_sizes_can_be_stored(tiny_models, group_size):
    """At 8 bits, a division by 2^8 would give small rows a step size below 2^-17, and so fewer codes."""
    meta_model, source, arguments = opened(tiny_models["llama"])
    scheme = Scheme(num_bits=8, group_size=group_size, activation_bits=8)
    block = resident(meta_model, source, arguments, scheme=scheme)
    pair = next(pair for pair in meta_model.smoothing_pairs(1) if pair.smooth_layer == "mlp.up_proj")
    weight = block.layers[pair.smooth_layer].weight
    weight.mul_(2.0 ** -(torch.arange(len(weight)) % 12).view(-1, 1))
    x = torch.randn(8, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    settings = BlockSettings(scheme, ReconstructionConfig(), TransformConfig(smoothing="always"))
    seen = watched(block, x, settings)[pair.balance_layers[0]]
    seen = seen.divided(torch.exp2(-20.0 * (torch.arange(len(weight)) % 12 == 11)))
    step = grouped(weight, num_groups(weight.shape[1], group_size)).abs().amax(-1).float().amin(1) * 2 / 255
    schemes = dict.fromkeys(pair.balance_layers, scheme)
    for rule in ("paper", "huawei", "search"):
        config = TransformConfig(smoothing="always", smoothing_rule=rule)
        unlimited = smoothing_scale(block.module, pair, seen, schemes, config)
        scale = smoothing_scale(block.module, pair, seen, {**schemes, pair.smooth_layer: scheme}, config)
        assert ((unlimited > 1) & (step / unlimited < SMALLEST_SCALE)).any()
        assert ((scale <= 1) | (step / scale >= SMALLEST_SCALE)).all()


def test_rule_search_smooths_nothing_with_fewer_than_128_sampled_tokens(tiny_models):
    meta_model, source, arguments = opened(tiny_models["llama"])
    scheme = Scheme(num_bits=4, group_size=8, activation_bits=4)
    block = resident(meta_model, source, arguments, scheme=scheme)
    x = torch.randn(8, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 100
    settings = BlockSettings(scheme, ReconstructionConfig(), TransformConfig(smoothing="always"))
    statistics = watched(block, x, settings)
    pair = next(pair for pair in meta_model.smoothing_pairs(1) if pair.smooth_layer == "mlp.up_proj")
    schemes, seen = dict.fromkeys(block.layers, scheme), statistics[pair.balance_layers[0]]
    assert len(seen.sample) == 128
    assert (smoothing_scale(block.module, pair, seen, schemes, settings.transforms) != 1).any()
    few = replace(seen, sample=seen.sample[:100])
    assert (smoothing_scale(block.module, pair, few, schemes, settings.transforms) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_stored_norms_are_the_original_norms_divided_by_powers_of_two(make_config, with_outliers, monkeypatch, dtype):
    """The dtype in which blocks compute does not matter. Here it is bf16 as on CUDA, with fewer digits than the norms are stored with."""
    monkeypatch.setattr("cbqstream.run.inputs.compute_dtype", lambda device: torch.bfloat16)
    folder, transforms = with_outliers("llama", dtype), TransformConfig(smoothing="always", smoothing_rule="paper")
    out = quantize(make_config(model=folder, transforms=transforms, reconstruction={"rounding": "nearest"}))
    (_, before), (_, after) = open_model(folder), open_model(out)
    name = "model.layers.1.input_layernorm.weight"
    divided = before.read(name, device=CPU.device).float() / after.read(name, device=CPU.device).float()
    assert (divided != 1).any()
    assert torch.equal(divided.log2(), divided.log2().round())
