"""Result of each model family: quantized with a stop in between, loaded by transformers, and compared with the streamed evaluation."""

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
"""Families whose linear layers in transformers use `self.weight` themselves, so that transformers can only load them dequantized."""
OLD = version("transformers") < "5.18"
"""Whether transformers is one of the older versions that are supported, such as 5.17."""
OTHER_NAMES = ("gemma3", "gpt_neox", "mixtral", "qwen2_5_vl")
"""Families with other names in checkpoints than in modules. transformers 5.17 keeps the tensors that it renames in bf16 for any dtype."""


def selected(family, scheme):
    """Whether a family is tested with a scheme: with both in `tools/families.sh`, otherwise most families with W4A8 only."""
    return scheme == "W4A8" or family in SOME_FAMILIES or os.environ.get("CBQSTREAM_FAMILIES") == "all"


@pytest.fixture
def inputs_quantized_as_in_transformers(monkeypatch):
    """A function that makes the streamed evaluation quantize the inputs of the layers of a family as transformers does.

    transformers does not quantize the inputs of experts, or of layers that it has dequantized. compressed-tensors 0.20 computes the scale
    of an input by reducing over all dimensions but the first two. For inputs [B, S, D] that is one scale per token. But OPT passes
    [B S, D] to its feed-forward layers and Qwen2-MoE to its shared expert, so that all tokens have one scale, and DeepSeek has inputs
    [B, 1, S, D]. Inference engines always quantize per token, and so does this project.
    """

    def apply(family):
        quantizer = PackedCheckpoint.input_quantizer

        def as_in_transformers(self, name):
            quantize_tokens = None if ".experts." in name or family in DENSE_ONLY else quantizer(self, name)
            if quantize_tokens is None:
                return None
            return lambda x: quantize_tokens(x.flatten(2) if x.dim() > 2 else x.flatten()).view_as(x)

        monkeypatch.setattr(PackedCheckpoint, "input_quantizer", as_in_transformers)

    return apply


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(
    ("family", "scheme"), [(family, scheme) for family in FAMILIES for scheme in SCHEMES if selected(family, scheme)]
)
def test_transformers_loads_the_result_with_the_streamed_perplexity(
    make_config, tokens, inputs_quantized_as_in_transformers, family, scheme
):
    """Perplexity of the loaded result agrees with the streamed evaluation to a relative 1e-4.

    It agrees to 1e-3 only if transformers dequantizes layers, whose weights are then bf16, and to 1e-2 for tensors that 5.17 keeps in bf16.
    """
    if OLD and family in DENSE_ONLY:
        pytest.skip("transformers 5.17 cannot load it dequantized")
    config = make_config(family, scheme=SCHEMES[scheme], reconstruction={"epochs": 1})
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=2)
    out = quantize(config)
    meta_model, _ = open_model(out)
    becomes_dense = family in DENSE_ONLY or any(".experts." in name for name in meta_model.blocks[-1].linears)
    inputs_quantized_as_in_transformers(family)
    ids = load_segments(tokens, out, num_samples=16, seq_len=SEQ_LEN, vocab_size=VOCAB)
    dtype = torch.bfloat16 if OLD and family in OTHER_NAMES else torch.float32
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if family in DENSE_ONLY else {}
    plain = plain_perplexity(out, ids, dtype=dtype, **options)
    rel = 1e-2 if OLD and family in OTHER_NAMES else 1e-3 if becomes_dense else 1e-4
    assert streamed_perplexity(out, ids) == pytest.approx(plain, rel=rel)
