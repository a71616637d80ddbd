"""The formats of compressed-tensors: encoding and decoding of weights, discovery of layers, and the quantization_config."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.errors import UsageError
from cbqstream.numerics.affine import codes_of_levels, dequantize, nearest_levels
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.packed import pack_quantized
from cbqstream.packed.format import quantization_config, schemes_of
from cbqstream.packed.layout import INPUT_SCALE
from cbqstream.packed.layouts import LAYOUTS, encode, layout_of, layouts_in, newer_formats
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import LayerSchemes, Scheme

W8A8 = Scheme(num_bits=8, group_size=None, activation_bits=8)
SCHEMES = [
    *(
        Scheme(num_bits=bits, group_size=size, symmetric=symmetric)
        for bits in (2, 3, 4, 5, 8)
        for size in (8, None)
        for symmetric in (True, False)
    ),
    W8A8,
    replace(W8A8, symmetric=False),
    replace(W8A8, group_size=8),
]


def random_weight(scheme, rows, columns):
    """A random weight that is rounded to nearest."""
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    scale, zero_point = minmax_grid(w_OI, scheme)
    codes = codes_of_levels(nearest_levels(w_OI, scale, zero_point, scheme), zero_point)
    return QuantizedWeight(codes, scale, zero_point, scheme)


def as_compressed_tensors_stores_it(weight, scheme):
    """Tensors of a weight that the compressor of compressed-tensors makes, by the format that its config group names."""
    (group,) = QuantizationConfig.model_validate(quantization_config(LayerSchemes(scheme), [])).config_groups.values()
    tensors = {"weight": dequantize(weight), "weight_scale": weight.scale}
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = weight.zero_point
    return BaseCompressor.get_value_from_registry(group.format).compress(tensors, group)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [40, 4096, 9001])
def test_encoded_weights_are_those_of_compressed_tensors_bit_for_bit_and_are_decoded_exactly(scheme, rows):
    """Weights with more than 4096 rows are packed in slabs."""
    weight, layout = random_weight(scheme, rows, 24), layout_of(scheme)
    stored, expected = encode(weight, scale_dtype=torch.bfloat16), as_compressed_tensors_stores_it(weight, scheme)
    assert stored.keys() == expected.keys() == set(layout.needed(scheme))
    for part, tensor in stored.items():
        assert torch.equal(tensor, expected[part].to(tensor.dtype)), part
        assert tensor.dtype == (torch.bfloat16 if part == "weight_scale" else expected[part].dtype), part
    for part, (shape, dtype) in layout.parts(scheme, rows, 24).items():
        assert stored[part].shape == shape
        assert dtype in (None, stored[part].dtype)
    decoded = layout.decode(stored, scheme)
    assert torch.equal(decoded.codes, weight.codes)
    assert torch.equal(decoded.scale, weight.scale)
    assert (decoded.zero_point is None) == scheme.symmetric
    assert scheme.symmetric or torch.equal(decoded.zero_point, weight.zero_point)


def test_only_8_bit_weights_per_channel_with_8_bit_inputs_are_stored_as_int_quantized():
    for scheme in (W8A8, replace(W8A8, symmetric=False), replace(W8A8, activation_strategy="tensor")):
        assert layout_of(scheme).format == "int-quantized"
        assert newer_formats(LayerSchemes(Scheme(num_bits=4), (("a", scheme),))) == ["int-quantized"]
    for change in ({"group_size": 8}, {"activation_bits": None}, {"activation_bits": 4}, {"num_bits": 4}):
        assert layout_of(replace(W8A8, **change)).format == "pack-quantized"
        assert newer_formats(LayerSchemes(replace(W8A8, **change))) == []


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (W8A8, None),
        (Scheme(num_bits=8), None),
        (replace(W8A8, group_size=64), r"W8A8 in groups of 64 is stored as pack-quantized, .* Use --group-size -1\."),
        (
            replace(W8A8, symmetric=False),
            r"W8A8 with zero points is not loaded by vLLM 0\.32 .* Leave out --no-symmetric",
        ),
    ],
)
def test_w8a8_that_engines_do_not_load_has_a_warning(scheme, expected):
    found = layout_of(scheme).warning(scheme)
    assert (found is None) == (expected is None)
    assert expected is None or re.match(expected, found)


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


def test_groups_with_different_formats_are_mixed_precision():
    mixed = LayerSchemes(W8A8, (("a", replace(W8A8, num_bits=4)), ("b", replace(W8A8, symmetric=False))))
    made = quantization_config(mixed, [])
    assert made["format"] == "mixed-precision"
    formats = [group["format"] for group in made["config_groups"].values()]
    assert formats == ["pack-quantized", "int-quantized", "int-quantized"]
    assert schemes_of(made) == mixed
    assert quantization_config(LayerSchemes(W8A8, (("b", W8A8),)), [])["format"] == "int-quantized"


def test_a_quantization_config_of_older_versions_is_read():
    """They stored all schemes as pack-quantized."""
    old = quantization_config(LayerSchemes(W8A8), ["lm_head", "re:.*gate$"])
    old["format"] = old["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert schemes_of(old) == LayerSchemes(W8A8, (), frozenset({"lm_head", "re:.*gate$"}), (".*gate$",))
    old["config_groups"]["group_0"].pop("format")
    assert schemes_of(old).default == W8A8


@pytest.mark.parametrize(
    "edit",
    [
        lambda made: made["config_groups"]["group_0"].update(format="float-quantized"),
        lambda made: made["config_groups"]["group_0"].update(format=["int-quantized"]),
        lambda made: made["config_groups"]["group_0"]["weights"].update(num_bits=4),
        lambda made: made.update(ignore=[3]),
        lambda made: made.update(ignore=["re:("]),
    ],
)
def test_a_quantization_config_with_another_format_is_refused(edit):
    made = quantization_config(LayerSchemes(W8A8), [])
    edit(made)
    with pytest.raises(UsageError, match="in a form that is not supported"):
        schemes_of(made)


def test_layers_are_found_by_their_tensors_unless_they_are_ignored():
    """A part of an int-quantized layer alone is a damaged layer. A packed layer is found by its codes."""
    infos = {
        name: TensorInfo(name, str(dtype), dtype, (8, 8), Path("file"), 0, 1)
        for name, dtype in {
            "packed.weight_packed": torch.int32,
            "packed.weight_scale": torch.bfloat16,
            "whole.weight": torch.int8,
            "whole.weight_scale": torch.bfloat16,
            "no_scale.weight": torch.int8,
            "no_codes.weight": torch.bfloat16,
            "no_codes.weight_scale": torch.bfloat16,
            "dense.weight": torch.bfloat16,
            "copied.weight": None,
            "ignored.weight": torch.int8,
            "ignored.weight_scale": torch.bfloat16,
            "kept.experts.0.weight": torch.int8,
        }.items()
    }
    schemes = schemes_of(quantization_config(LayerSchemes(W8A8), ["ignored", r"re:.*experts\..*$"]))
    found = {layer: layout.format for layer, layout in layouts_in(infos, schemes).items()}
    ints = dict.fromkeys(("whole", "no_scale", "no_codes"), "int-quantized")
    assert found == {"packed": "pack-quantized", **ints}


@pytest.mark.parametrize("scheme", [Scheme(num_bits=4, group_size=8, activation_bits=8), W8A8])
def test_one_input_scale_is_stored(scheme):
    scheme = replace(scheme, activation_strategy="tensor")
    weight = random_weight(scheme, 9001, 8)
    stored = encode(replace(weight, input_scale=torch.full((1,), 0.5)), scale_dtype=torch.bfloat16)
    assert stored[INPUT_SCALE].tolist() == [0.5]
    assert stored[INPUT_SCALE].dtype == torch.bfloat16


def test_every_format_is_one_of_compressed_tensors():
    assert all(BaseCompressor.get_value_from_registry(name) for name in LAYOUTS)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("columns", [7, 32, 100])
def test_codes_are_packed_as_the_library_packs_them(num_bits, columns):
    codes = torch.randint(-(1 << (num_bits - 1)), 1 << (num_bits - 1), (5, columns)).to(torch.int8)
    packed, by_library = pack_quantized._packed(codes, num_bits), pack_quantized.pack_to_int32(codes, num_bits)
    assert torch.equal(packed, by_library)
    assert packed.dtype == by_library.dtype == torch.int32
