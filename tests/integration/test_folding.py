"""Rescaling outlier channels changes nothing that a block computes, and what is exported knows of it."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbqstream.config import OutlierConfig, ReconstructionConfig, Scheme
from cbqstream.evaluation.model import open_model
from cbqstream.models.block import build_block
from cbqstream.models.ends import model_ends
from cbqstream.numerics.scratch import Scratch
from cbqstream.records import Compute
from cbqstream.windows.folding import apply_fold, parameters_of
from cbqstream.windows.quantized_linear import Phase, replace_linears
from cbqstream.windows.resident import BlockSettings, ResidentBlock, run_blocks
from tiny import FAMILIES, SEQ_LEN, SOME_FAMILIES, VOCAB, save_model

CPU = Compute(torch.device("cpu"), torch.float32, 2)
SCHEME = Scheme(num_bits=4, group_size=32)


def resident(skeleton, source, arguments, index=1, scheme=SCHEME):
    module = build_block(skeleton, index, source, device=CPU.device, dtype=CPU.dtype, linear_dtype=None)
    layers = replace_linears(module, dict.fromkeys(skeleton.blocks[index].linears, scheme), Scratch())
    return ResidentBlock(index, module, arguments[index], layers, skeleton.folds(index))


@cache
def opened(folder):
    skeleton, source = open_model(folder)
    ids = torch.randint(0, VOCAB, (SEQ_LEN,), generator=torch.Generator().manual_seed(0))
    with model_ends(skeleton, source, device=CPU.device, dtype=CPU.dtype) as ends:
        return skeleton, source, ends.block_arguments(ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**31))
def test_a_folded_block_computes_the_same(tiny_models, family, seed):
    skeleton, source, arguments = opened(tiny_models[family])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, SEQ_LEN, skeleton.hidden_size, generator=generator)
    plain = run_blocks([resident(skeleton, source, arguments)], x, Phase.ORIGINAL)
    block = resident(skeleton, source, arguments)
    assert skeleton.folds(1)
    for fold in skeleton.folds(1):
        channels = parameters_of(block.module.get_submodule(fold.writer))["weight"].shape[0]
        scale = torch.exp2(torch.randint(-2, 6, (channels,), generator=generator).float())
        before = parameters_of(block.module.get_submodule(fold.writer))["weight"].clone()
        apply_fold(block.module, fold, scale)
        assert not torch.equal(before, parameters_of(block.module.get_submodule(fold.writer))["weight"])
    assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)


def test_norms_that_the_residual_reads_are_not_folded(tmp_path):
    folder = save_model(tmp_path / "opt", "opt", do_layer_norm_before=False)
    assert [fold.writer for fold in open_model(folder)[0].folds(1)] == ["self_attn.v_proj", "fc1"]
    folder = save_model(tmp_path / "gelu", "opt", activation_function="gelu")
    assert "fc1" not in [fold.writer for fold in open_model(folder)[0].folds(1)]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_outliers_are_found_and_folded(tiny_models, family):
    """A channel of the first norm is made 64 times as large; the scale of its input is the root of what stands out."""
    skeleton, source, arguments = opened(tiny_models[family])
    block = resident(skeleton, source, arguments)
    writer = skeleton.folds(1)[0].writer
    for value in parameters_of(block.module.get_submodule(writer)).values():
        value[5] *= 64
    x = torch.randn(4, SEQ_LEN, skeleton.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = run_blocks([block], x, Phase.ORIGINAL)
    settings = BlockSettings(SCHEME, ReconstructionConfig(), OutlierConfig(activations="always", variant="paper"))
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
    skeleton, source, arguments = opened(tiny_models[family])
    scheme = Scheme(num_bits=4, group_size=8, activation_bits=4)
    x = torch.randn(4, SEQ_LEN, skeleton.hidden_size, generator=torch.Generator().manual_seed(0))
    errors = {}
    for when in ("never", "always"):
        block = resident(skeleton, source, arguments, scheme=scheme)
        for fold in skeleton.folds(1):
            channels = parameters_of(block.module.get_submodule(fold.writer))["weight"].shape[0]
            outlying = torch.where(torch.arange(channels) % 7 == 0, 2.0**-5, 1.0)
            # large inputs that small weights read, as trained models have them
            apply_fold(block.module, fold, outlying)
        plain = run_blocks([block], x, Phase.ORIGINAL)
        settings = BlockSettings(scheme, ReconstructionConfig(), OutlierConfig(activations=when, variant="search"))
        block.watch_inputs(x.shape[0] * x.shape[1], settings)
        run_blocks([block], x, Phase.ORIGINAL)
        block.start(settings, torch.Generator())
        assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)
        errors[when] = (run_blocks([block], x, Phase.HARD) - plain).square().mean()
    assert errors["always"] < 0.5 * errors["never"]
