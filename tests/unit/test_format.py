"""The pack-quantized format: encoding and decoding of weights, and the quantization_config."""

from dataclasses import replace

import pytest
import torch

from cbqstream.numerics.affine import codes_of_levels, nearest_levels
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.packed.format import decode, encode, encode_in_slabs, parts_of, quantization_config, schemes_of
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import LayerSchemes, Scheme

SCHEMES = [
    Scheme(num_bits=bits, group_size=size, symmetric=symmetric)
    for bits in (2, 3, 4, 5, 8)
    for size in (8, None)
    for symmetric in (True, False)
]


def random_weight(scheme, rows, columns):
    """A random weight that is rounded to nearest."""
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    scale, zero_point = minmax_grid(w_OI, scheme)
    codes = codes_of_levels(nearest_levels(w_OI, scale, zero_point, scheme), zero_point)
    return QuantizedWeight(codes, scale, zero_point, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [40, 4096, 9001])
def test_encoding_in_slabs_of_rows_equals_encoding_at_once_and_is_decoded_exactly(scheme, rows):
    weight = random_weight(scheme, rows, 24)
    whole, slabs = (encoder(weight, scale_dtype=torch.bfloat16) for encoder in (encode, encode_in_slabs))
    assert whole.keys() == slabs.keys() == set(parts_of(scheme))
    assert all(torch.equal(whole[part], slabs[part]) for part in whole)
    decoded = decode(slabs, scheme)
    assert torch.equal(decoded.codes, weight.codes)
    assert torch.equal(decoded.scale, weight.scale)
    assert (decoded.zero_point is None) == scheme.symmetric
    assert scheme.symmetric or torch.equal(decoded.zero_point, weight.zero_point)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"(?:.*\.)?q_proj", {r"(?:.*\.)?q_proj", r"(?:.*\.)?qkv_proj"}),
        (r"(?:.*\.)?gate_proj", {r"(?:.*\.)?gate_proj", r"(?:.*\.)?gate_up_proj"}),
        (r"(?:.*\.)?q_a_proj", {r"(?:.*\.)?q_a_proj", r"(?:.*\.)?fused_qkv_a_proj"}),
        (r"(?:.*\.)?down_proj", {r"(?:.*\.)?down_proj"}),
    ],
)
def test_targets_of_an_override_include_the_joined_name_of_layers_that_vllm_merges(pattern, names):
    schemes = LayerSchemes(Scheme(num_bits=4), ((pattern, Scheme(num_bits=8)),))
    groups = quantization_config(schemes, [])["config_groups"].values()
    assert {target for group in groups for target in group["targets"]} == {f"re:{name}$" for name in names} | {"Linear"}
    assert schemes_of(quantization_config(schemes, [])).of(f"layers.0.{pattern[9:]}").num_bits == 8


def test_encoding_in_slabs_stores_one_input_scale():
    scheme = Scheme(num_bits=4, group_size=8, activation_bits=8, activation_strategy="tensor")
    weight = random_weight(scheme, 9001, 8)
    stored = encode_in_slabs(replace(weight, input_scale=torch.full((1,), 0.5)), scale_dtype=torch.bfloat16)
    assert stored["input_scale"].tolist() == [0.5]
