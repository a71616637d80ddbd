"""Every family from source to result: quantized, stopped and resumed, loaded by plain transformers."""

import os
from importlib.metadata import version

import pytest
import torch
from transformers import CompressedTensorsConfig

from cbqstream import quantize
from cbqstream.calibration.segments import load_segments
from cbqstream.errors import StoppedError
from cbqstream.evaluation.model import open_model
from cbqstream.packed.packed_checkpoint import PackedCheckpoint
from cbqstream.scheme import Scheme
from perplexities import plain_perplexity, streamed_perplexity
from tiny import FAMILIES, SEQ_LEN, SOME_FAMILIES, VOCAB

SCHEMES = {"W4A16": Scheme(num_bits=4, group_size=32), "W4A8": Scheme(num_bits=4, group_size=32, activation_bits=8)}
DENSE_ONLY = ("falcon",)
"""Families whose linear layers in transformers compute with `self.weight` themselves, and so only load dequantized."""
OLD = version("transformers") < "5.18"
OTHER_NAMES = ("gemma3", "gpt_neox", "mixtral", "qwen2_5_vl")
"""Families with other names in checkpoints than in modules: transformers 5.17 leaves what it renames in bf16, whatever is asked for."""


def shown(family, scheme):
    """The ordinary run takes one scheme of most families; `tools/families.sh` both of all."""
    return scheme == "W4A8" or family in SOME_FAMILIES or os.environ.get("CBQSTREAM_FAMILIES") == "all"


@pytest.fixture
def inputs_as_transformers_has_them(monkeypatch):
    """transformers quantizes no inputs of experts, nor of what it has made dense, and some otherwise than per token.

    compressed-tensors 0.20 finds the scale of a token's input by reducing over all dimensions but the first two. That is a token for
    [B, S, D]; but OPT hands [B S, D] to its feed-forward layers, and Qwen2-MoE to its shared expert, where all tokens then have one scale,
    and DeepSeek has [B, 1, S, D] somewhere. Inference engines quantize per token always, and so does this project.
    """

    def apply(family):
        quantizer = PackedCheckpoint.input_quantizer

        def as_there(self, name):
            quantize_tokens = None if ".experts." in name or family in DENSE_ONLY else quantizer(self, name)
            if quantize_tokens is None:
                return None
            return lambda x: quantize_tokens(x.flatten(2) if x.dim() > 2 else x.flatten()).view_as(x)

        monkeypatch.setattr(PackedCheckpoint, "input_quantizer", as_there)

    return apply


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(
    ("family", "scheme"), [(family, scheme) for family in FAMILIES for scheme in SCHEMES if shown(family, scheme)]
)
def test_transformers_loads_the_result_and_agrees(make_config, tokens, inputs_as_transformers_has_them, family, scheme):
    """Where transformers makes dense weights of it they are bf16, and less near."""
    if OLD and family in DENSE_ONLY:
        pytest.skip("transformers 5.17 does not load it dequantized either")
    config = make_config(family, scheme=SCHEMES[scheme], reconstruction={"epochs": 1})
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=2)
    out = quantize(config)
    meta_model, _ = open_model(out)
    becomes_dense = family in DENSE_ONLY or any(".experts." in name for name in meta_model.blocks[-1].linears)
    inputs_as_transformers_has_them(family)
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    dtype = torch.bfloat16 if OLD and family in OTHER_NAMES else torch.float32
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if family in DENSE_ONLY else {}
    plain = plain_perplexity(out, ids, dtype=dtype, **options)
    rel = 1e-2 if OLD and family in OTHER_NAMES else 1e-3 if becomes_dense else 1e-4
    assert streamed_perplexity(out, ids) == pytest.approx(plain, rel=rel)
