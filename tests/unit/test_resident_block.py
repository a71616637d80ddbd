"""A block of a window: how it starts, what the next window continues from, and what it becomes when it is hardened."""

import pytest
import torch

from cbqstream.config import ReconstructionConfig, TransformConfig
from cbqstream.disk import Disk
from cbqstream.errors import InputError
from cbqstream.evaluation.model import open_model
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.numerics.affine import dequantize
from cbqstream.records import Compute
from cbqstream.rounding.nearest import Nearest
from cbqstream.rounding.signround import SignRound
from cbqstream.runtime.offload import OffloadedTensor
from cbqstream.scheme import Scheme
from cbqstream.transforms.smoothing import Smoothing
from cbqstream.windows.quantized_linear import Phase, QuantizedLinear
from cbqstream.windows.read_block import read_block
from cbqstream.windows.resident_block import BlockSettings, ResidentBlock, all_layers, run_blocks
from tiny import SEQ_LEN, VOCAB

CPU = Compute(torch.device("cpu"), torch.float32, 2)
W4A8 = Scheme(num_bits=4, group_size=32, activation_bits=8)
PLAIN = BlockSettings(Scheme(num_bits=4, group_size=32), ReconstructionConfig(), TransformConfig())
SMOOTHED = BlockSettings(W4A8, ReconstructionConfig(), TransformConfig(smoothing_rule="paper", truncate_weights=True))


@pytest.fixture
def block_of(tiny_models):
    """A function that reads a block of a family, and makes inputs for it."""

    def read(family="llama", settings=PLAIN, index=1, file=None, skip=()):
        meta_model, source = open_model(tiny_models[family])
        ids = torch.arange(SEQ_LEN) * 5 % VOCAB
        with load_embedding_and_head(meta_model, source, device=CPU.device, dtype=CPU.dtype) as outer:
            arguments = outer.block_arguments(ids)
        schemes = {name: settings.scheme for name in meta_model.blocks[index].linears if name not in skip}
        block = read_block(meta_model, index, source, schemes, arguments[index], CPU, settings.scratch, file)
        x = torch.randn(4, SEQ_LEN, meta_model.hidden_size, generator=torch.Generator().manual_seed(0))
        x[..., 3] *= 20
        return block, x

    return read


def started(block, x, settings, **options):
    """The block with roundings, from the statistics of the inputs."""
    block.watch_inputs(x.shape[0] * x.shape[1], settings, **options)
    run_blocks([block], x, Phase.ORIGINAL)
    block.start(settings, torch.Generator().manual_seed(0))
    return block


def trained(block, x):
    """The block after a training step that moves scales and rounding values."""
    for layer in all_layers([block]):
        with layer.rounding.placed(), torch.no_grad():
            layer.rounding.theta += 0.02
            if isinstance(layer.rounding, SignRound):
                layer.rounding.v += 0.4
    return block


def test_a_block_computes_with_the_weights_of_the_phase(block_of):
    block, x = block_of()
    plain = run_blocks([block], x, Phase.ORIGINAL)
    started(block, x, PLAIN)
    assert torch.equal(run_blocks([block], x, Phase.ORIGINAL), plain)
    hard = run_blocks([block], x, Phase.HARD)
    assert not torch.equal(hard, plain)
    assert torch.allclose(
        run_blocks([block], x, Phase.SOFT), hard, atol=1e-4
    )  # signround: only the stored scale differs


def test_activation_checkpointing_gives_the_same_output_and_gradients(block_of):
    found = []
    for checkpointing in (False, True):
        block, x = block_of()
        started(block, x, PLAIN)
        x = x.clone().requires_grad_()
        run_blocks([block], x, Phase.SOFT, activation_checkpointing=checkpointing).square().sum().backward()
        found.append([x.grad, *(layer.rounding.theta.grad for layer in block.layers.values())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [PLAIN, SMOOTHED], ids=["plain", "smoothed and truncated"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_the_next_window_continues_from_the_window_state(block_of, tmp_path, settings, offloaded):
    with Disk().scratch(tmp_path / "layers") as scratch:
        file = scratch if offloaded else None
        block, x = block_of(settings=settings, file=file)
        trained(started(block, x, settings), x)
        state = {
            name: value.read() if isinstance(value, OffloadedTensor) else value.clone()
            for name, value in block.window_state().items()
        }
        again, _ = block_of(settings=settings, file=file)
        again.resume(settings, torch.Generator().manual_seed(0), state)
        assert torch.equal(run_blocks([again], x, Phase.HARD), run_blocks([block], x, Phase.HARD))
        assert torch.equal(run_blocks([again], x, Phase.ORIGINAL), run_blocks([block], x, Phase.ORIGINAL))
        assert again.window_state().keys() == block.window_state().keys()


def test_reverting_restores_roundings_and_keeps_transforms(block_of):
    block, x = block_of(settings=SMOOTHED)
    started(block, x, SMOOTHED)
    before, start = run_blocks([block], x, Phase.HARD), block.state()
    found = {layer: scale.clone() for layer, scale in block.found[Smoothing.name].items()}
    assert found
    trained(block, x)
    assert not torch.equal(run_blocks([block], x, Phase.HARD), before)
    block.load(start)
    assert torch.equal(run_blocks([block], x, Phase.HARD), before)
    assert all(torch.equal(block.found[Smoothing.name][layer], scale) for layer, scale in found.items())


def test_a_hardened_block_computes_with_the_weights_that_were_given(block_of):
    block, x = block_of()
    started(block, x, PLAIN)
    expected = run_blocks([block], x, Phase.HARD)
    given = dict(block.harden())
    assert given.keys() == block.layers.keys() == block.sqnr_db.keys()
    assert torch.equal(run_blocks([block], x, Phase.HARD), expected)
    layer = block.layers["mlp.up_proj"]
    assert layer.rounding is None
    assert torch.equal(layer.weight, given["mlp.up_proj"].codes)
    assert 10 < block.sqnr_db["mlp.up_proj"] < 40
    assert dequantize(given["mlp.up_proj"]).shape == layer.weight.shape


def test_tensors_that_no_layer_holds_are_stored_as_the_transforms_leave_them(block_of):
    block, x = block_of(settings=SMOOTHED)
    norm = block.module.get_submodule("input_layernorm").weight.detach().clone()
    started(block, x, SMOOTHED)
    scale = block.found[Smoothing.name]["input_layernorm"]
    assert torch.equal(block.stored("input_layernorm.weight", norm), norm / scale)
    assert torch.equal(block.stored("some.other.weight", norm), norm)


def test_layers_in_full_precision_are_not_part_of_a_smoothing_pair(block_of):
    block, _ = block_of(skip=("mlp.up_proj",))
    assert "mlp.up_proj" not in block.layers
    touched = {name for pair in block.parts.pairs for name in (pair.smooth_layer, *pair.balance_layers)}
    assert not {"mlp.up_proj", "post_attention_layernorm"} & touched
    assert "self_attn.v_proj" in touched


def test_a_layer_that_never_runs_is_refused_by_name(block_of, monkeypatch):
    block, x = block_of()
    monkeypatch.setattr(QuantizedLinear, "_watch", lambda layer, x: None)
    block.watch_inputs(x.shape[0] * x.shape[1], PLAIN)
    run_blocks([block], x, Phase.ORIGINAL)
    with pytest.raises(InputError, match=r"is never called as a layer\. .*--ignore"):
        block.start(PLAIN, torch.Generator())


def test_undersampled_experts_are_rounded_to_nearest_and_do_not_learn(block_of):
    block, x = block_of("qwen3_moe")
    few = x[:1]
    started(block, few, PLAIN)
    assert block.undersampled
    assert all(".experts." in name for name in block.undersampled)
    for name, layer in block.layers.items():
        rounding = layer.rounding
        assert isinstance(rounding, Nearest if name in block.undersampled else SignRound)
        assert rounding.theta.requires_grad == (name not in block.undersampled)
    again, _ = block_of("qwen3_moe")
    again.resume(PLAIN, torch.Generator(), block.window_state())
    assert again.undersampled == block.undersampled


def test_with_all_experts_every_expert_sees_every_token(block_of):
    block, x = block_of("qwen3_moe")
    started(block, x, PLAIN, all_experts=True)
    counts = {block.tokens[name] for name in block.layers if ".experts." in name}
    assert counts == {x.shape[0] * x.shape[1]}
    assert not block.undersampled


def test_a_block_without_quantized_layers_only_computes(block_of):
    block, x = block_of()
    plain = ResidentBlock(block.index, block.module, block.arguments)
    assert torch.equal(run_blocks([plain], x, Phase.ORIGINAL), run_blocks([block], x, Phase.ORIGINAL))
    assert list(plain.harden()) == []
