"""Residuals of blocks whose routed experts are reconstructed alone, for families that treat the sums of experts in other ways."""

import json
from dataclasses import replace

import pytest
import torch

from cbqstream.activations.memory_store import MemoryStore
from cbqstream.activations.store import StreamShape
from cbqstream.config import WindowConfig
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.run.experts_alone import route_and_sum
from cbqstream.run.finished import computing_block
from cbqstream.run.inputs import open_inputs
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.read_block import with_experts
from cbqstream.windows.resident_block import ResidentBlock, run_blocks
from cbqstream.windows.residuals import factor_of_sums, replace_sums_by_residuals

CPU = torch.device("cpu")


@pytest.fixture
def opened_block(tool, tmp_path, make_config):
    """Function that makes a model, and opens a block without its experts: inputs of a run, block, experts, a random input stream."""

    def open_block(name, **changes):
        tool.make_model(name, tmp_path / "model")
        described = tmp_path / "model" / "source" / "config.json"
        described.write_text(json.dumps(json.loads(described.read_text()) | changes))
        config = make_config(model=described.parent, num_samples=4, window=WindowConfig(size=1, overlap=0))
        config = replace(config, reconstruction=replace(config.reconstruction, experts="alone"))
        opened, index = open_inputs(config, CPU, 1), 1
        with load_embedding_and_head(opened.meta_model, opened.source, device=CPU, dtype=torch.float32) as outer:
            arguments = outer.block_arguments(opened.tokens[0])
        stream = MemoryStore(StreamShape(*opened.stream_shape))
        generator = torch.Generator().manual_seed(0)
        for segment in range(len(opened.tokens)):
            stream.write(segment, torch.randn(opened.stream_shape[1:], generator=generator))
        module = computing_block(opened, index, opened.source)
        experts = with_experts(module, opened.meta_model.blocks[index], opened.experts_alone(index))
        return opened, ResidentBlock(index, module, arguments[index], experts=experts), experts, stream

    return open_block


def whole(store):
    """All segments of a store, float32 [N, S, D]."""
    return torch.stack([store.read(segment) for segment in range(store.shape.num_segments)]).float()


@pytest.mark.parametrize(
    ("name", "changes", "factor"),
    [
        ("mixtral", {}, 1.0),
        ("deepseek_v3", {}, 1.0),
        ("granitemoe", {"residual_multiplier": 0.5}, 0.5),
        ("gemma4 experts", {}, None),
    ],
)
def test_the_factor_of_the_sums_in_the_output_of_a_block(opened_block, name, changes, factor):
    """Granite multiplies what its experts add. Gemma 4 has a norm behind them."""
    opened, block, experts, stream = opened_block(name, **changes)
    found = factor_of_sums(block, experts, stream, opened.compute)
    assert found == (None if factor is None else pytest.approx(factor, rel=1e-4))


def test_residuals_complete_the_output_of_a_block(opened_block):
    """The output of a block whose sums are increased by their residuals is the target, to the precision of bf16."""
    opened, block, experts, stream = opened_block("granitemoe", residual_multiplier=0.5)
    route_and_sum(opened, block, stream, opened.source, None)
    sums, targets = stream.beside[experts.key].store, MemoryStore(StreamShape(*opened.stream_shape))
    for segment in range(len(opened.tokens)):
        targets.write(segment, stream.read(segment) * 1.25)
    before = whole(sums)
    replace_sums_by_residuals(block, experts, stream, targets, sums, opened.compute, factor=0.5)
    after = whole(sums)
    with torch.no_grad():
        found = run_blocks([block], whole(stream), Phase.HARD, {experts.key: before + after})
    assert after.abs().max() > 0.1
    torch.testing.assert_close(found, whole(targets), rtol=0, atol=0.01 * whole(targets).abs().max().item())
