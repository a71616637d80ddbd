"""Architectures that cannot be run block by block, or are stored in a form that is not supported.

`plan`, `quantize` and `evaluate` refuse them with one true line before anything is written.
"""

import json
import re

import pytest
from safetensors.torch import load_file, save_file

from cbqstream import evaluate, plan, quantize
from cbqstream.errors import InputError
from cbqstream.records import RunWarning
from tiny import save_model

CASES = {
    "dory": ("llama", {}, r"the model does not call the blocks of model\.layers once each, in order"),
    "gpt2": ("opt", {}, r"the blocks of GPT2LMHeadModel have no linear layers"),
    "xlm": (
        "llama",
        {"emb_dim": 64, "n_heads": 4, "n_layers": 4, "n_words": 96, "pad_index": 2},
        r"transformer\.ffns\.1 \(TransformerFFN\) does not receive the output of the block before it",
    ),
    "zamba": (
        "llama",
        {"tie_word_embeddings": True, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        r"block 3 has weights of block 1, and such blocks cannot be quantized",
    ),
}
"""Family whose sizes are used, other settings, and the reason, by model type."""


@pytest.mark.parametrize("family", CASES)
def test_an_architecture_that_is_not_supported_is_refused_with_the_reason(tmp_path, make_config, tokens, family):
    like, settings, reason = CASES[family]
    folder = save_model(tmp_path / "model", family, like=like, **settings)
    config = make_config(model=folder)
    lines = set()
    for command in (quantize, lambda config: plan(config, with_time=False)):
        with pytest.raises(InputError, match=reason) as caught:
            command(config)
        lines.add(str(caught.value))
    assert len(lines) == 1, lines
    assert len(lines.pop().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    if "--ignore" not in reason and "be quantized" not in reason:
        with pytest.raises(InputError, match=reason):
            evaluate(folder, tokens, num_samples=2, seq_len=16, device="cpu")


def test_layers_that_cannot_be_quantized_stay_in_full_precision_and_are_named(tmp_path, make_config):
    """Of BART, only the decoder is used, which never calls its cross-attention."""
    parts = {
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
        **{f"{part}_layers": 4 for part in ("encoder", "decoder")},
    }
    folder = save_model(tmp_path / "model", "bart", like="llama", pad_token_id=1, d_model=64, **parts)
    config = make_config(model=folder, reconstruction={"rounding": "nearest"})
    events = []
    out = quantize(config, events.append)
    names = [f"encoder_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    line = f"{folder}: stays in full precision, because it is never called as a layer: {', '.join(names)}."
    assert line in [event.text for event in events if isinstance(event, RunWarning)]
    assert line in plan(make_config(model=folder, name="other"), with_time=False).warnings
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"model.decoder.layers.0.{name}" for name in names} <= {*ignored}


def test_the_reason_why_a_tensor_is_missing_names_what_is_stored_instead(tmp_path, make_config):
    folder = save_model(tmp_path / "model", max_shard_size="1GB")
    path = folder / "model.safetensors"
    original = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"

    def message(tensors):
        save_file(tensors, path)
        with pytest.raises(InputError) as caught:
            quantize(make_config(model=folder))
        return re.sub(r"^\S+: ", "", str(caught.value))

    without = {key: value for key, value in original.items() if key != name}
    assert message(without) == f'tensor "{name}": missing from the weights. Download the model again.'
    instead = (
        'missing from the weights. They have "{}" instead, which LlamaForCausalLM of transformers does not have. Use'
    )
    for other in ("model.layers.1.mlp.w3.weight", "encoder.layers.1.mlp.up_proj.weight"):
        found = message({**without, other: original[name]})
        assert found.startswith(f'tensor "{name}": {instead.format(other)}'), found
