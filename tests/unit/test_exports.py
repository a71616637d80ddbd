"""Export formats: the bits of each, decoded here by their published layout, and what each refuses."""

import pytest
import torch

from cbqstream.config import ReconstructionConfig
from cbqstream.errors import UsageError
from cbqstream.numerics.affine import dequantize
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.packed.exports import EXPORTS, pack_words, require_exact, require_whole_words
from cbqstream.rounding.nearest import Nearest
from cbqstream.rounding.rounding import RoundingStart
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import LayerSchemes, Scheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantized(scheme, rows=16, columns=64):
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1
    grid, settings = minmax_grid(w_OI, scheme), ReconstructionConfig()
    return Nearest(RoundingStart(w_OI, *grid, scheme, settings, torch.Generator(), Scratch())).harden()


def unpacked(words, num_bits, order=None):
    """Unsigned values of int32 words along the last dimension."""
    per_word = 32 // num_bits
    values = torch.stack(
        [(words.long() >> (place * num_bits)) & ((1 << num_bits) - 1) for place in range(per_word)], -1
    )
    places = torch.empty(per_word, dtype=torch.long)
    places[torch.tensor(order or range(per_word))] = torch.arange(per_word)
    return values[..., places].flatten(-2)


@pytest.mark.parametrize(("num_bits", "order"), [(2, None), (4, None), (8, None), (4, AWQ_ORDER)])
def test_words_are_unpacked_exactly(num_bits, order):
    values = torch.randint(0, 1 << num_bits, (5, 64), generator=torch.Generator().manual_seed(1))
    words = pack_words(values, num_bits, order)
    assert words.dtype == torch.int32
    assert torch.equal(unpacked(words, num_bits, order), values)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize(("name", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_holds_codes_scales_and_zero_points(num_bits, group_size, name, offset):
    weight = quantized(Scheme(num_bits=num_bits, group_size=group_size))
    stored = EXPORTS[name].encode(weight, torch.bfloat16)
    codes_IO = unpacked(stored["qweight"].T, num_bits).T
    zero_GO = (unpacked(stored["qzeros"], num_bits) + offset) & ((1 << num_bits) - 1)
    groups = stored["g_idx"].long()
    w_IO = (codes_IO - zero_GO[groups]) * stored["scales"].float()[groups]
    assert torch.equal(w_IO.T, dequantize(weight))


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_holds_codes_scales_and_zero_points(symmetric):
    weight = quantized(Scheme(num_bits=4, group_size=32, symmetric=symmetric))
    stored = EXPORTS["awq"].encode(weight, torch.bfloat16)
    codes_IO, zero_GO = unpacked(stored["qweight"], 4, AWQ_ORDER), unpacked(stored["qzeros"], 4, AWQ_ORDER)
    groups = torch.arange(64) // 32
    w_IO = (codes_IO - zero_GO[groups]) * stored["scales"].float()[groups]
    assert torch.equal(w_IO.T, dequantize(weight))


def test_dense_rounds_to_the_dtype_of_the_source():
    weight = quantized(Scheme(num_bits=3, group_size=16, symmetric=False))
    stored = EXPORTS["dense"].encode(weight, torch.bfloat16)
    assert torch.equal(stored["weight"], dequantize(weight).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "scheme", "reason"),
    [
        ("gptq", Scheme(num_bits=4, symmetric=False), "zero points .* Formats that can: awq"),
        ("gptq", Scheme(num_bits=3), "3 bits"),
        ("gptq", Scheme(num_bits=4, activation_bits=8), "inputs of 8 bits .* No other format can"),
        ("awq", Scheme(num_bits=4, group_size=None), "one scale per channel"),
        ("awq", Scheme(num_bits=8), "8 bits"),
        ("awq", Scheme(num_bits=4, group_size=48), "groups of 48"),
        ("gguf", Scheme(num_bits=3, group_size=256, symmetric=False), "3 bits with zero points"),
        ("gguf", Scheme(num_bits=4, group_size=16), "groups of 16"),
    ],
)
def test_a_scheme_that_a_format_cannot_hold_is_refused_by_reason(name, scheme, reason):
    with pytest.raises(UsageError, match=f"format {name} cannot represent {reason}"):
        require_exact(name, LayerSchemes(scheme))


def test_layers_of_different_widths_are_refused_by_formats_with_one_width():
    mixed = LayerSchemes(Scheme(num_bits=4), (("a", Scheme(num_bits=8)),))
    with pytest.raises(UsageError, match="layers with different schemes"):
        require_exact("gptq", mixed)
    require_exact("dense", mixed)


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"format 'exl3' is not supported\. Use dense, gptq, gptq_v2, awq, gguf"):
        require_exact("exl3", LayerSchemes(Scheme(num_bits=4)))


def test_a_layer_that_leaves_a_part_of_a_word_empty_is_refused():
    require_whole_words("gptq", "layer", (16, 64), Scheme(num_bits=4))
    with pytest.raises(UsageError, match="needs a multiple of 8 rows, but layer has 12"):
        require_whole_words("gptq", "layer", (12, 64), Scheme(num_bits=4))
