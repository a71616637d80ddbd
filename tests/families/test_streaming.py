"""Streamed evaluation of each model family, block by block, compared with transformers."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from cbqstream.evaluation.model import open_model
from cbqstream.models.block import build_block, run_block
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.records import Compute
from perplexities import streamed_perplexity
from tiny import FAMILIES, VOCAB, make_model, save_model

CPU = Compute(torch.device("cpu"), torch.float32, 2)


def segments(count, length, seed=0):
    """Random token ids [count, length]."""
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_transformers(tmp_path, family):
    """Masks (sliding windows, too), rotary embeddings, learned positions, biases and norms are those of the model: logits agree to 1e-4."""
    model = make_model(family)
    folder = save_model(tmp_path / family, family, dtype=torch.float32)
    ids = segments(2, 24)
    meta_model, source = open_model(folder)
    with load_embedding_and_head(meta_model, source, device=CPU.device, dtype=CPU.dtype) as outer:
        arguments = outer.block_arguments(ids[0])
        x = torch.stack([outer.embed(row) for row in ids])
        for index in range(len(meta_model.blocks)):
            block = build_block(meta_model, index, source, device=CPU.device, dtype=CPU.dtype, linear_dtype=CPU.dtype)
            x = run_block(block, x, arguments[index])
        logits = torch.stack([torch.cat(list(outer.logits(row))) for row in x])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_perplexity_is_that_of_transformers(tmp_path, family):
    """Perplexity of five segments agrees to a relative 1e-5."""
    model = make_model(family)
    ids = segments(5, 16)
    folder = save_model(tmp_path / family, family, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    expected = math.exp(functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert streamed_perplexity(folder, ids) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_block_keeps_the_stored_dtype_of_its_linear_weights_if_none_is_given(tmp_path, dtype):
    """The other parameters of the block have the dtype in which it computes, float32."""
    meta_model, source = open_model(save_model(tmp_path / "m", dtype=dtype))
    block = build_block(meta_model, 1, source, device=CPU.device, dtype=CPU.dtype, linear_dtype=None)
    assert block.get_submodule("self_attn.q_proj").weight.dtype == dtype
    assert block.get_submodule("input_layernorm").weight.dtype == torch.float32


def test_weights_do_not_stay_in_memory_after_use(tmp_path):
    """Parameters of the model are on the meta device after its embedding was used, and after a block was built from it."""
    meta_model, source = open_model(save_model(tmp_path / "m"))
    with load_embedding_and_head(meta_model, source, device=CPU.device, dtype=CPU.dtype) as outer:
        outer.embed(segments(1, 16)[0])
        assert all(parameter.device.type == "cpu" for parameter in meta_model.hf_model.parameters())
    assert all(parameter.device.type == "meta" for parameter in meta_model.hf_model.parameters())
    build_block(meta_model, 0, source, device=CPU.device, dtype=CPU.dtype, linear_dtype=None)
    assert all(parameter.device.type == "meta" for parameter in meta_model.templates[0].parameters())


def test_a_checkpoint_may_leave_out_the_prefix_of_the_base_model(tmp_path):
    """In older OPT checkpoints the tensors of `model.decoder.layers.0` have names that begin with `decoder.layers.0`."""
    folder = save_model(tmp_path / "opt", "opt", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, folder / "model.safetensors")
    meta_model, _ = open_model(folder)
    assert meta_model.blocks[2].tensors["fc1.weight"] == "decoder.layers.2.fc1.weight"
