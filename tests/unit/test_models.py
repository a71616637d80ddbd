"""Model families: facts in one record, experts as separate layers, and names in checkpoints."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import InputError, UsageError
from cbqstream.evaluation.model import open_model
from cbqstream.models.block import BlockArguments, SlabLinear, build_block, run_block
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.models.experts import Experts, separate_experts, tokens_by_expert
from cbqstream.models.families import FAMILIES, UNTESTED, SmoothingPair, family_of, joined_with, smoothing_pairs
from cbqstream.models.meta_model import MetaModel
from tiny import FAMILIES as TINY
from tiny import SEQ_LEN, VOCAB, make_model

CPU = torch.device("cpu")


def test_a_family_without_a_row_has_the_defaults():
    assert family_of("arcee") == UNTESTED
    assert family_of("bloom").eager_attention
    assert family_of("llama").gguf.interleaved
    assert not family_of("qwen3").gguf.interleaved


def test_a_smoothing_pair_is_found_wherever_all_its_layers_are():
    pair = SmoothingPair("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",))
    modules = ["mlp.experts.0.up_proj", "mlp.experts.0.down_proj", "mlp.experts.11.up_proj", "mlp.experts.11.down_proj"]
    found = pair.in_block([*modules, "mlp.experts.2.up_proj"])
    assert [(one.smooth_layer, one.balance_layers) for one in found] == [
        ("mlp.experts.0.up_proj", ("mlp.experts.0.down_proj",)),
        ("mlp.experts.11.up_proj", ("mlp.experts.11.down_proj",)),
    ]


def test_a_smoothing_pair_depends_on_the_configuration():
    modules = ["fc1", "fc2"]
    for activation, count in (("relu", 1), ("gelu", 0)):
        config = SimpleNamespace(activation_function=activation, do_layer_norm_before=True)
        assert len(smoothing_pairs(family_of("opt"), config, modules)) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_smoothing_pair_in_its_blocks(tiny_models, family):
    meta_model, _ = open_model(tiny_models[family])
    for pair in meta_model.smoothing_pairs(1):
        block = meta_model.templates[1]
        read = {block.get_submodule(name).weight.shape[1] for name in pair.balance_layers}
        assert len(read) == 1
    assert meta_model.smoothing_pairs(1)


@pytest.mark.parametrize(
    ("layer", "joined"),
    [
        ("self_attn.k_proj", "self_attn.q_proj"),
        ("mlp.up_proj", "mlp.gate_proj"),
        ("self_attn.o_proj", "self_attn.o_proj"),
        ("mlp.experts.3.down_proj", "mlp.experts"),
        ("self_attn.kv_a_proj_with_mqa", "self_attn.q_a_proj"),
    ],
)
def test_layers_that_engines_compute_as_one_share_a_name(layer, joined):
    assert joined_with(layer) == joined


EXPERT_FORMS = {
    **{family: {} for family in ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3")},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "nemotron_h": {"n_routed_experts": 4, "moe_intermediate_size": 32, "layers_block_type": ["moe"] * 4},
}
"""Settings of families whose experts are fused in another way: transposed, interleaved and with biases, without a gate."""


@pytest.mark.parametrize("family", EXPERT_FORMS)
@torch.no_grad()
def test_separate_experts_compute_what_fused_experts_do(family):
    """The same block, with the values of the fused tensors in the separate layers."""
    settings = EXPERT_FORMS[family]
    model = make_model(family, like="mixtral", **settings) if settings else make_model(family)
    block = model.base_model.layers[2]
    name, fused = next((name, module) for name, module in block.named_modules() if hasattr(module, "_apply_gate"))
    separate = copy.deepcopy(block)
    separate_experts(separate, family_of(family).experts)
    experts = separate.get_submodule(name)
    assert isinstance(experts, Experts)
    whole = {tensor: torch.randn(getattr(fused, tensor).shape) for tensor in {p.tensor for p in experts.fused.values()}}
    for tensor, values in whole.items():
        setattr(fused, tensor, nn.Parameter(values))
    for number, expert in enumerate(experts):
        state = {leaf: part.take(whole[part.tensor][number]) for leaf, part in experts.fused.items()}
        expert.load_state_dict(state, assign=True)
    part = next(iter(experts.fused.values()))
    taken = {part.half: torch.stack([part.take(values) for values in whole[part.tensor]])}
    assert torch.equal(part.fuse(taken), whole[part.tensor])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 64, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(20)])
    weights = torch.rand(20, 2, generator=generator)
    expected = fused(x, chosen, weights)
    assert torch.allclose(experts(x, chosen, weights), expected, atol=1e-5)
    experts.see_all = True
    assert torch.allclose(experts(x, chosen, weights), expected, atol=1e-5)


def test_experts_of_an_unknown_form_are_refused_by_name():
    block = nn.Module()
    block.experts = nn.Module()
    block.experts.gate_up_proj = nn.Parameter(torch.ones(4, 8, 4))
    block.experts.down_proj = nn.Parameter(torch.ones(4, 4, 4))
    with pytest.raises(ValueError, match=r"form that is not supported \(their activation is not a function of its own"):
        separate_experts(block, family_of("mixtral").experts)


def test_tokens_of_experts_are_counted_once_for_each_expert():
    layers = {
        f"mlp.experts.{index}.{part}": 10 * index
        for index in range(3)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    assert tokens_by_expert({**layers, "self_attn.q_proj": 99}) == {"mlp.experts": [0, 10, 20]}


def test_names_of_experts_in_checkpoints(tiny_models):
    meta_model, _ = open_model(tiny_models["mixtral"])
    stored = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    spec = meta_model.blocks[1]
    assert spec.tensors["mlp.experts.2.down_proj.weight"] == stored
    assert meta_model.infos[stored] == meta_model.dense[stored]


def test_arguments_for_a_batch_repeat_what_runs_over_segments():
    alibi, mask = torch.arange(8.0).view(4, 1, 2), torch.ones(1, 1, 2, 2)
    arguments = BlockArguments({"alibi": alibi, "attention_mask": mask, "cache": None}, ("alibi",))
    for_batch = arguments.for_batch(3)
    assert for_batch["alibi"].shape == (12, 1, 2)
    assert torch.equal(for_batch["alibi"][4:8], alibi)
    assert for_batch["attention_mask"] is mask


@torch.no_grad()
def test_a_large_layer_is_multiplied_in_slabs(tiny_models, monkeypatch):
    monkeypatch.setattr("cbqstream.numerics.slabs.SLAB_WEIGHTS", 700)
    meta_model, source = open_model(tiny_models["llama"])
    block = build_block(meta_model, 0, source, device=CPU, dtype=torch.float32, linear_dtype=torch.float32)
    layer = block.get_submodule("mlp.up_proj")
    assert isinstance(layer, SlabLinear)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_embedding_and_head_are_those_of_the_model(tiny_models, family):
    """Through all blocks, one after the other, the logits are those of the whole model; nothing stays in memory afterwards."""
    meta_model, source = open_model(tiny_models[family])
    ids = torch.arange(SEQ_LEN) * 5 % VOCAB
    with torch.no_grad(), load_embedding_and_head(meta_model, source, device=CPU, dtype=torch.float32) as outer:
        arguments, x = outer.block_arguments(ids), outer.embed(ids).unsqueeze(0)
        for index in range(len(meta_model.blocks)):
            block = build_block(meta_model, index, source, device=CPU, dtype=torch.float32, linear_dtype=torch.float32)
            x = run_block(block, x, arguments[index])
        logits = torch.cat(list(outer.logits(x[0])))
    assert logits.shape == (SEQ_LEN, VOCAB)
    assert torch.isfinite(logits).all()
    assert all(parameter.device.type == "meta" for parameter in meta_model.hf_model.parameters())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "nothing"}, "is not in transformers"),
        ({"model_type": "nothing", "auto_map": {"AutoModel": "x.Y"}}, "needs remote code"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "weights have 4"),
        ({"hidden_size": 128}, "config.json requires"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tiny_models, change, match):
    folder = tiny_models["llama"]
    config, tensors = read_json(folder, "config.json"), Checkpoint.open(folder).infos
    with pytest.raises(InputError, match=match):
        MetaModel(folder, {**config, **change}, tensors)


def test_segments_longer_than_learned_positions_are_refused(tiny_models):
    meta_model, _ = open_model(tiny_models["opt"])
    meta_model.check_length(64)
    with pytest.raises(UsageError, match="must be 2 to 64"):
        meta_model.check_length(65)
