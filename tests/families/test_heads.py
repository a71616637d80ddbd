"""Heads as checkpoints have them: tied or not, stored or not, and heads that no causal language model has."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from cbqstream import quantize
from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.commands.check import check
from cbqstream.errors import InputError
from perplexities import plain_perplexity, streamed_perplexity
from tiny import VOCAB, save_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def ids():
    return torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))


def edited(tmp_path, family="llama", *, change=lambda tensors: None, config=lambda values: None, **options):
    """Folder of a model in one shard, after changes of its tensors and of config.json."""
    folder = save_model(tmp_path / "model", family, dtype=torch.float32, max_shard_size="1GB", **options)
    tensors, values = load_file(folder / "model.safetensors"), read_json(folder, "config.json")
    change(tensors)
    config(values)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tie(values):
    values["tie_word_embeddings"] = True


def tie_in_text_config(values):
    values.pop("tie_word_embeddings", None)
    values["text_config"]["tie_word_embeddings"] = True


@pytest.mark.parametrize(
    ("family", "change", "config"),
    [
        ("llama", lambda tensors: None, tie),
        ("llama", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}), tie),
        ("llama", lambda tensors: tensors.pop(HEAD), tie),
        ("llama", lambda tensors: tensors.pop(EMBEDDING), tie),
        ("qwen2_5_vl", lambda tensors: tensors.pop(HEAD), tie_in_text_config),
        ("gemma2", lambda tensors: tensors.update({HEAD: 0.5 * tensors[EMBEDDING]}), lambda values: None),
    ],
    ids=["tied, another head", "tied, the same head", "tied, no head", "tied, no embedding", "text_config", "default"],
)
def test_the_head_is_the_one_that_transformers_uses(tmp_path, family, change, config):
    folder = edited(tmp_path, family, change=change, config=config)
    assert streamed_perplexity(folder, ids()) == pytest.approx(plain_perplexity(folder, ids()), rel=1e-5)


def test_a_head_that_config_json_ties_and_that_differs_is_kept_and_named(tmp_path, make_config):
    folder, events = edited(tmp_path, config=tie), []
    out = quantize(make_config(model=folder), events.append)
    assert any(
        "config.json ties the head to the embedding, but lm_head.weight is stored and differs" in str(event)
        for event in events
    )
    assert torch.equal(load_file(out / "rest.safetensors")[HEAD], load_file(folder / "model.safetensors")[HEAD])
    options = {"device_map": "cpu"}
    assert streamed_perplexity(out, ids()) == pytest.approx(plain_perplexity(out, ids(), **options), rel=1e-5)
    assert not check(out, read_data=False, load=True).problems


def test_no_warning_about_a_head_that_equals_the_embedding(tmp_path, make_config):
    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()

    events = []
    quantize(make_config(model=edited(tmp_path, change=change, config=tie)), events.append)
    assert not [event for event in events if "ties the head" in str(event)]


def test_a_model_without_a_head_that_is_not_tied_is_refused_with_the_reason(tmp_path):
    folder = edited(tmp_path, change=lambda tensors: tensors.update({"score.weight": tensors.pop(HEAD)[:2].clone()}))
    pattern = r'tensor "lm_head\.weight": missing from the weights\. They have "score\.weight" instead, which LlamaForCausalLM '
    with pytest.raises(InputError, match=pattern):
        streamed_perplexity(folder, ids())


FURTHER = {
    "mtp.fc.weight": (64, 128),
    "mtp.layers.0.mlp.up_proj.weight": (128, 64),
    "v_head.summary.weight": (1, 64),
    "score.weight": (2, 64),
    "model.layers.4.mlp.up_proj.weight": (128, 64),
    "model.layers.4.input_layernorm.weight": (64,),
}
"""Shapes of weights that a causal language model does not have: of a draft head, a value head, a classifier, and a block that predicts
further tokens."""


def with_further_weights(tensors):
    generator = torch.Generator().manual_seed(3)
    tensors |= {name: torch.randn(shape, generator=generator) for name, shape in FURTHER.items()}


def test_copied_weights_that_the_model_does_not_have_are_ignored_by_engines(tmp_path, make_config):
    """Every copied matrix is in the list `ignore`. Otherwise engines expect it to be quantized."""
    folder = edited(
        tmp_path, change=with_further_weights, config=lambda values: values.update(num_nextn_predict_layers=1)
    )
    out = quantize(make_config(model=folder))
    config = read_json(out, "config.json")["quantization_config"]
    infos = Checkpoint.open(out).infos
    copied = [
        name.removesuffix(".weight") for name, info in infos.items() if name.endswith(".weight") and len(info.shape) > 1
    ]
    assert set(copied) >= {name.removesuffix(".weight") for name, shape in FURTHER.items() if len(shape) > 1}
    assert set(copied) <= set(config["ignore"])
    assert len(config["ignore"]) == len(set(config["ignore"]))
    found = check(out, read_data=False, load=True)
    assert not found.problems, found.problems
    assert streamed_perplexity(out, ids()) == pytest.approx(plain_perplexity(out, ids()), rel=1e-5)


def test_the_further_block_of_a_quantized_source_is_dense_and_ignored(tmp_path, make_config, tool_named):
    """DeepSeek V3 is published in FP8, also the block that predicts further tokens.

    Engines read this block of the result under its dense names, and quantize what is not in `ignore`.
    """
    tool_named("published_models").make_published("DeepSeek V3, V3.1, R1", tmp_path / "model")
    source, dense = (load_file(tmp_path / "model" / name / "model.safetensors") for name in ("source", "dense"))
    out = quantize(make_config(model=tmp_path / "model" / "source", reconstruction={"rounding": "nearest"}))
    stored = {name: value for shard in out.glob("*.safetensors") for name, value in load_file(shard).items()}
    further = {name for name in dense if name.startswith("model.layers.4.")}
    assert {name for name in stored if name.startswith("model.layers.4.")} == further
    assert any(f"{name}_scale_inv" in source for name in further)
    assert not [name for name in stored if "scale_inv" in name]
    assert {stored[name].dtype for name in further if "e_score" not in name} == {torch.bfloat16}
    for name in further:
        assert torch.equal(stored[name], dense[name]), name
    config = read_json(out, "config.json")
    assert config["num_nextn_predict_layers"] == 1
    matrices = {name.removesuffix(".weight") for name in further if dense[name].dim() > 1}
    assert matrices >= {"model.layers.4.eh_proj", "model.layers.4.mlp.experts.0.up_proj", "model.layers.4.mlp.gate"}
    assert matrices <= set(config["quantization_config"]["ignore"])


def test_a_block_too_many_is_refused_if_it_does_not_predict_further_tokens(tmp_path):
    folder = edited(tmp_path, change=with_further_weights)
    with pytest.raises(InputError, match=r"config\.json describes 4 blocks, but the weights have 5\."):
        streamed_perplexity(folder, ids())


def test_a_classifier_is_quantized_and_its_own_class_loads_the_result(tmp_path, make_config):
    """Its head is tied, so it is a causal language model too. `check` loads the class that config.json names, and misses no weight."""

    def config(values):
        tie(values)
        values |= {
            "architectures": ["Qwen2ForSequenceClassification"],
            "pad_token_id": 0,
            "id2label": {"0": "a", "1": "b"},
        }

    def change(tensors):
        tensors.pop(HEAD, None)
        tensors["score.weight"] = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))

    out = quantize(make_config(model=edited(tmp_path, "qwen2", change=change, config=config)))
    found = check(out, read_data=False, load=True)
    assert not found.problems, found.problems
    assert any("Qwen2ForSequenceClassification" in fact for fact in found.facts)
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.score.weight, load_file(out / "rest.safetensors")["score.weight"])


def test_a_weight_that_the_class_needs_and_the_result_lacks_is_a_problem(tmp_path, make_config):
    out = quantize(make_config(model=edited(tmp_path)))
    path = out / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "architectures": ["LlamaForSequenceClassification"]}))
    problems = check(out, read_data=False, load=True).problems
    assert len(problems) == 1
    assert re.search(r"LlamaForSequenceClassification .*score\.weight", problems[0])
