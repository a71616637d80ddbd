"""Blocks of GGUF: quantized weights are encoded here and decoded by the gguf package."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as read_blocks

from cbqstream.numerics.affine import dequantize, storable_scale
from cbqstream.packed.gguf_blocks import block_kind, cannot_gguf, encode_blocks
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import Scheme

SUPPORTED = {
    "Q4_0": [Scheme(num_bits=4, group_size=size) for size in (32, 64, None)],
    "Q8_0": [Scheme(num_bits=8, group_size=size) for size in (32, None)],
    "Q4_K": [Scheme(num_bits=4, group_size=size, symmetric=False) for size in (256, None)],
    "Q3_K": [Scheme(num_bits=3, group_size=size) for size in (256, None)],
    "Q2_K": [
        Scheme(num_bits=2, group_size=size, symmetric=symmetric) for size in (256, None) for symmetric in (True, False)
    ],
}


def random_weight(scheme, rows=24, columns=512):
    generator = torch.Generator().manual_seed(0)
    groups = 1 if scheme.group_size is None else columns // scheme.group_size
    low, high = scheme.qmin, scheme.qmax + 1
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    scale = storable_scale(torch.rand(rows, groups, generator=generator) ** 4 + 1e-6)
    zero_point = (
        None if scheme.symmetric else torch.randint(low, high, (rows, groups), generator=generator, dtype=torch.int8)
    )
    return QuantizedWeight(codes, scale, zero_point, scheme)


@pytest.mark.parametrize(
    ("name", "scheme"), [(name, scheme) for name, schemes in SUPPORTED.items() for scheme in schemes], ids=str
)
def test_gguf_decodes_exactly_the_dequantized_weight(name, scheme):
    weight = random_weight(scheme)
    assert cannot_gguf(scheme) is None
    assert block_kind(scheme)[0] == name
    found = read_blocks(encode_blocks(weight).numpy(), GGMLQuantizationType[name])
    assert np.array_equal(found, dequantize(weight).numpy())


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(num_bits=4, group_size=16), "groups of 16 (Q4_0 supports multiples of 32, or one scale per channel)"),
        (
            Scheme(num_bits=4, group_size=64, symmetric=False),
            "groups of 64 (Q4_K supports multiples of 256, or one scale per channel)",
        ),
        (Scheme(num_bits=3, group_size=None, symmetric=False), "3 bits with zero points"),
        (Scheme(num_bits=6, group_size=None), "6 bits without zero points"),
        (Scheme(num_bits=4, group_size=None, activation_bits=8), "inputs of 8 bits"),
    ],
)
def test_unsupported_schemes_are_refused_with_a_reason(scheme, reason):
    assert cannot_gguf(scheme) == reason
