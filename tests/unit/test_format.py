"""The stored form of a weight."""

from dataclasses import replace

import pytest
import torch

from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.packed.format import decode, encode, encode_in_slabs, parts_of, quantization_config, schemes_of
from cbqstream.rounding.rounding import Rounding
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import LayerSchemes, Scheme

SCHEMES = [
    Scheme(num_bits=bits, group_size=size, symmetric=symmetric)
    for bits in (2, 3, 4, 5, 8)
    for size in (8, None)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [40, 4096, 9001])
def test_slabs_make_what_encoding_at_once_makes(scheme, rows):
    w_OI = torch.randn(rows, 24, generator=torch.Generator().manual_seed(0))
    weight = Rounding(w_OI, *minmax_grid(w_OI, scheme), scheme, Scratch()).harden()
    whole, slabs = (made(weight, scale_dtype=torch.bfloat16) for made in (encode, encode_in_slabs))
    assert whole.keys() == slabs.keys() == set(parts_of(scheme))
    assert all(torch.equal(whole[part], slabs[part]) for part in whole)
    back = decode(slabs, scheme)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scale, weight.scale)
    assert (back.zero_point is None) == scheme.symmetric
    assert scheme.symmetric or torch.equal(back.zero_point, weight.zero_point)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"(?:.*\.)?q_proj", {r"(?:.*\.)?q_proj", r"(?:.*\.)?qkv_proj"}),
        (r"(?:.*\.)?gate_proj", {r"(?:.*\.)?gate_proj", r"(?:.*\.)?gate_up_proj"}),
        (r"(?:.*\.)?q_a_proj", {r"(?:.*\.)?q_a_proj", r"(?:.*\.)?fused_qkv_a_proj"}),
        (r"(?:.*\.)?down_proj", {r"(?:.*\.)?down_proj"}),
    ],
)
def test_targets_have_the_names_of_layers_that_are_computed_as_one(pattern, names):
    schemes = LayerSchemes(Scheme(num_bits=4), ((pattern, Scheme(num_bits=8)),))
    groups = quantization_config(schemes, [])["config_groups"].values()
    assert {target for group in groups for target in group["targets"]} == {f"re:{name}$" for name in names} | {"Linear"}
    assert schemes_of(quantization_config(schemes, [])).of(f"layers.0.{pattern[9:]}").num_bits == 8


def test_slabs_have_one_step_size_of_inputs():
    w_OI = torch.randn(9001, 8, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(num_bits=4, group_size=8, activation_bits=8, activation_strategy="tensor")
    weight = Rounding(w_OI, *minmax_grid(w_OI, scheme), scheme, Scratch()).harden()
    stored = encode_in_slabs(replace(weight, input_scale=torch.full((1,), 0.5)), scale_dtype=torch.bfloat16)
    assert stored["input_scale"].tolist() == [0.5]
