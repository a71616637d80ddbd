"""The trial of the code of a model before its weights are read: variants of the code of Llama that pass or are refused by name."""

import re

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel

from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import DeviceMemoryError, InputError
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.models.handover import Handover
from cbqstream.models.meta_model import MetaModel
from cbqstream.models.probe import probe
from tiny import FAMILIES


def meta_model_of(folder):
    return MetaModel(folder, read_json(folder, "config.json"), Checkpoint.open(folder).infos)


@pytest.fixture
def llama(tiny_models):
    return meta_model_of(tiny_models["llama"])


@pytest.fixture
def calling(monkeypatch, llama):
    """Function that tries Llama with another way to call its blocks."""

    def trial(call):
        def forward(self, input_ids=None, inputs_embeds=None, position_ids=None, **_):
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            position_ids = torch.arange(x.shape[1]).unsqueeze(0) if position_ids is None else position_ids
            named = {"position_embeddings": self.rotary_emb(x, position_ids), "attention_mask": None}
            return BaseModelOutputWithPast(last_hidden_state=self.norm(call(list(self.layers), x, named, input_ids)))

        monkeypatch.setattr(LlamaModel, "forward", forward)
        probe(llama)
        return llama.left_out

    return trial


@pytest.mark.parametrize("family", FAMILIES)
def test_tested_families_pass_and_all_their_layers_can_be_quantized(tiny_models, family):
    meta_model = meta_model_of(tiny_models[family])
    probe(meta_model)
    assert not any(meta_model.left_out)


def test_all_weights_are_on_the_meta_device_afterwards(llama):
    probe(llama)
    assert all(value.is_meta for value in llama.hf_model.parameters())
    assert all(value.is_meta for block in llama.templates for value in block.parameters())


def test_the_random_numbers_of_the_process_are_not_used(llama):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    probe(llama)
    assert torch.equal(before, torch.get_rng_state())


def in_order(blocks, x, named, ids):
    for block in blocks:
        x = block(x, **named)
    return x


def in_reverse(blocks, x, named, ids):
    return in_order(blocks[::-1], x, named, ids)


def twice(blocks, x, named, ids):
    return in_order(blocks + blocks, x, named, ids)


def without_the_last(blocks, x, named, ids):
    return in_order(blocks[:-1], x, named, ids)


def scaled_between(blocks, x, named, ids):
    for block in blocks:
        x = 1.5 * block(x, **named)
    return x


def from_the_first(blocks, x, named, ids):
    """Every block receives the embeddings, as in models with several lists of parallel modules."""
    return sum(block(x, **named) for block in blocks)


def with_tokens(blocks, x, named, ids):
    """The blocks receive values that depend on the tokens, as the inputs for each layer of Gemma 3n do."""
    return in_order(blocks, x, {**named, "per_layer_inputs": ids.float()}, ids)


def with_nested_tokens(blocks, x, named, ids):
    return in_order(blocks, x, {**named, "per_layer_inputs": {"ids": ids}}, ids)


def with_state(blocks, x, named, ids):
    """Each block receives values that the block before it computed."""
    state = torch.zeros(1)
    for block in blocks:
        x = block(x, **named, state={"nested": [state]})
        state = x.mean(1)
    return x


def with_the_embedding(blocks, x, named, ids):
    """The norm after the last block receives the embeddings too."""
    return in_order(blocks, x, named, ids) + x


@pytest.mark.parametrize("call", [in_order, with_tokens])
def test_blocks_that_are_called_in_order_pass(calling, call):
    assert not any(calling(call))


def test_the_size_of_the_arguments_that_depend_on_the_tokens_is_found(calling, llama):
    calling(in_order)
    assert llama.handover == Handover(64)
    calling(with_tokens)
    assert llama.handover == Handover(64, token_bytes=4)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            in_reverse,
            r"the model does not call the blocks of model\.layers once each, in order \(it calls \[3, 2, 1, 0\]",
        ),
        (
            twice,
            r"the model does not call the blocks of model\.layers once each, in order \(it calls \[0, 1, 2, 3, 0, ",
        ),
        (without_the_last, r"the model does not call the blocks of model\.layers once each, in order"),
        (scaled_between, r"model\.layers\.1 \(LlamaDecoderLayer\) does not receive the output of the block before it"),
        (from_the_first, r"model\.layers\.1 \(LlamaDecoderLayer\) does not receive the output of the block before it"),
        (with_the_embedding, "the head depends on the embedding or on other blocks than the last"),
        (
            with_nested_tokens,
            r'model\.layers\.0 \(LlamaDecoderLayer\) receives an argument "per_layer_inputs" that depends on the tokens and is',
        ),
        (
            with_state,
            r'model\.layers\.1 \(LlamaDecoderLayer\) receives an argument "state" that depends on other blocks',
        ),
    ],
)
def test_blocks_that_are_called_in_another_way_are_refused(calling, call, reason):
    pattern = (
        rf'config\.json: architecture "llama" cannot be run block by block here: {reason}.*\. Use another model\.$'
    )
    with pytest.raises(InputError, match=pattern):
        calling(call)


def test_a_model_that_counts_positions_in_another_way_counts_them_itself(monkeypatch, llama):
    """Without `position_ids`, the model adds other values to the embeddings than with those that count from 0."""
    original, counted = LlamaModel.forward, []

    def forward(self, inputs_embeds=None, input_ids=None, position_ids=None, **named):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        counted.append(position_ids is None)
        x = x + (2 if position_ids is None else 0) + torch.arange(x.shape[1])[:, None]
        return original(self, inputs_embeds=x, position_ids=position_ids, **named)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    probe(llama)
    assert not any(llama.left_out)
    weights = Checkpoint.open(llama.folder)
    with load_embedding_and_head(llama, weights, device=torch.device("cpu"), dtype=torch.float32) as outer:
        outer.embed(torch.arange(8))
    assert counted[-1]


def refused_block(monkeypatch, llama, forward):
    """The message with which Llama with another forward pass of its blocks is refused."""
    original = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, x, **named: forward(lambda: original(self, x, **named), x, named)
    )
    with pytest.raises(InputError) as caught:
        probe(llama)
    return str(caught.value)


def test_an_argument_that_a_block_wants_for_each_segment_is_repeated(monkeypatch, llama):
    original = LlamaDecoderLayer.forward

    def forward(self, x, position_embeddings, **named):
        if position_embeddings[0].shape[0] != x.shape[0]:
            raise ValueError("wrong number of segments")
        return original(self, x, position_embeddings=position_embeddings, **named)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    probe(llama)
    assert not any(llama.left_out)
    assert "position_embeddings" in llama.handover.repeated


def test_layers_with_code_of_their_own_are_named(monkeypatch, llama):
    class Halved(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight) / 2

    class Written(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    llama.templates[0].mlp.up_proj.__class__ = Halved
    llama.templates[0].mlp.down_proj.__class__ = Written
    own = {
        "mlp.up_proj": "is computed by code of its own",
        "mlp.gate_proj": "is computed by inference engines as one layer with such a layer",
    }
    probe(llama)
    assert llama.left_out == [own] * 4
    assert {"mlp.up_proj", "mlp.gate_proj"}.isdisjoint(llama.blocks[0].linears)


def test_an_exception_of_a_block_is_one_line(monkeypatch, llama):
    def fail(run, x, named):
        raise RuntimeError("no cache\nof keys.")

    message = refused_block(monkeypatch, llama, fail)
    assert message.endswith(
        "by block here: model.layers.0 (LlamaDecoderLayer): RuntimeError: no cache. Use another model."
    )


def test_a_block_that_changes_its_arguments_is_refused(monkeypatch, llama):
    def remember(run, x, named):
        named["position_embeddings"][0].add_(1)
        return run()

    assert 'changes its argument "position_embeddings", which other blocks may read' in refused_block(
        monkeypatch, llama, remember
    )


def test_a_block_whose_output_depends_on_the_batch_is_refused(monkeypatch, llama):
    message = refused_block(monkeypatch, llama, lambda run, x, named: run() + x.mean(0, keepdim=True))
    assert "computes another output for a segment alone than for it in a batch" in message


def test_hidden_states_of_another_shape_are_refused(monkeypatch, llama):
    message = refused_block(monkeypatch, llama, lambda run, x, named: torch.cat([run(), x], dim=-1))
    assert re.search(
        r"returns hidden states of shape \[2, 8, 128\] for 2 segments of 8 tokens, and not \[2, 8, 64\]", message
    )


def test_too_little_memory_for_the_trial_is_an_error_of_memory(monkeypatch, llama):
    def fail(self, x):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (out of memory)"
        )

    monkeypatch.setattr(LlamaMLP, "forward", fail)
    with pytest.raises(DeviceMemoryError, match="not enough memory to try"):
        probe(llama)


def test_layers_that_are_not_called_or_whose_weight_is_used_directly_are_named(monkeypatch, llama):
    def forward(self, x):
        return self.down_proj(x @ self.up_proj.weight.T * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    probe(llama)
    found = llama.left_out
    assert len(found) == 4
    assert found[3] == {
        "mlp.gate_proj": "is never called as a layer",
        "mlp.up_proj": "has a weight that the code of the block uses directly",
    }


def test_a_layer_that_changes_its_class_computes_as_before(llama):
    """The trial replaces the class of layers in a copy of the block; the templates keep theirs."""
    probe(llama)
    assert all(type(module) is nn.Linear for module in llama.templates[0].modules() if isinstance(module, nn.Linear))
