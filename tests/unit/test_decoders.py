"""Decoders of quantized weights: the values are those of the libraries, bit for bit, and what cannot be right is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, NVFP4PackedCompressor, PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters import (
    AutoAWQConverter,
    FP8BlockDequantizer,
    ModelOptNvfp4Converter,
)
from compressed_tensors.quantization.quant_scheme import NVFP4
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cbqstream.checkpoint.decoders import decoder
from cbqstream.checkpoint.decoding import DECODERS, decoded_tensors, quantizes_inputs
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import DerivedTensor, piece
from cbqstream.errors import InputError
from quantized import awq, compressed, dense_words, fp8, gptq, integers, modelopt_nvfp4, scheme_of

CPU = torch.device("cpu")
LAYER = "model.layers.0.mlp.up_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def weight(rows: int = 96, columns: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.manual_seed(3)) * 0.1).to(dtype)


def ct(format_name: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    plain = {key: str(value) if isinstance(value, torch.dtype) else value for key, value in weights.items()}
    group = {"targets": ["Linear"], "weights": plain}
    return {"quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": group}}


def opened(
    folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any], dtype: str = "bfloat16"
) -> Checkpoint:
    """A checkpoint with these tensors, decoded."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    stored = read_header(folder / "model.safetensors")
    return Checkpoint(decoded_tensors(folder, {"dtype": dtype, "quantization_config": quantization}, stored), stored)


def of_layer(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{LAYER}.{part}": value for part, value in parts.items()}


def decoded(folder: Path, parts: dict[str, torch.Tensor], quantization: dict[str, Any], dtype: str = "bfloat16"):
    """The only tensor of a model with one layer."""
    checkpoint = opened(folder, of_layer(parts), quantization, dtype)
    assert list(checkpoint.infos) == [f"{LAYER}.weight"]
    value = checkpoint.read(f"{LAYER}.weight", device=CPU)
    assert checkpoint.infos[f"{LAYER}.weight"].shape == value.shape
    return value


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.fixture(params=["whole", "slabs"])
def slabs(request, monkeypatch):
    """Whether weights are decoded at once or a few rows at a time."""
    if request.param == "slabs":
        monkeypatch.setattr(decoder, "_SLAB_WEIGHTS", 100)


FLOAT8 = {"num_bits": 8, "type": "float"}
COMPRESSED = {
    "group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "group, asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "3 bits, asymmetric": ("pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": False}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8, asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int8 per tensor": ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int4 in int8": ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}),
    "fp8 per channel": ("float-quantized", {**FLOAT8, "strategy": "channel"}),
    "fp8 per tensor": ("float-quantized", {**FLOAT8, "strategy": "tensor"}),
    "fp8 by blocks": ("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [32, 64]}),
    "fp8 by blocks with edges": ("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [40, 48]}),
    "fp8 naive": ("naive-quantized", {**FLOAT8, "strategy": "channel"}),
    "mxfp8": ("mxfp8-quantized", {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    ),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(case, dtype, tmp_path, slabs):
    format_name, weights = COMPRESSED[case]
    parts = compressed(weight(), format_name, **weights)
    compressor = BaseCompressor.get_value_from_registry(format_name)
    expected = compressor.decompress(parts, scheme_of(**weights))["weight"].to(getattr(torch, dtype))
    require_same(decoded(tmp_path, parts, ct(format_name, **weights), dtype), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_with_an_order_of_columns(tmp_path, slabs, symmetric):
    """Old writers store the group of each column; the columns of a group are then scattered."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    order = torch.randperm(128, generator=torch.manual_seed(1))
    ordered = compressed(weight()[:, order], "pack-quantized", **weights)
    scheme, compressor = scheme_of(**weights), PackedQuantizationCompressor
    expected = torch.empty(96, 128, dtype=torch.bfloat16)
    expected[:, order] = compressor.decompress(ordered, scheme)["weight"]
    codes = torch.empty(96, 128, dtype=torch.long)
    words = ordered["weight_packed"].long() & 0xFFFFFFFF
    codes[:, order] = ((words[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(1)
    g_idx = torch.empty(128, dtype=torch.int32)
    g_idx[order] = (torch.arange(128) // 32).int()
    parts = {**ordered, "weight_packed": dense_words(codes, 4), "weight_g_idx": g_idx}
    config = ct("pack-quantized", **weights, actorder="group")
    require_same(decoded(tmp_path, parts, config), expected)
    in_order = {**ordered, "weight_g_idx": torch.full((128,), -1, dtype=torch.int32)}
    require_same(decoded(tmp_path, in_order, config), compressor.decompress(ordered, scheme)["weight"])
    with pytest.raises(InputError, match="weight_g_idx does not have 32 columns in each of 4 groups"):
        decoded(tmp_path, {**parts, "weight_g_idx": g_idx.clamp(max=2)}, config)


def test_layers_of_compressed_tensors_may_have_different_schemes(tmp_path):
    schemes = {
        "re:.*up_proj$": {"num_bits": 8, "strategy": "channel"},
        "model.layers.0.mlp.down_proj": {**FLOAT8, "strategy": "channel"},
        "Linear": {"num_bits": 4, "strategy": "group", "group_size": 32},
    }
    formats = ["pack-quantized", "float-quantized", "pack-quantized"]
    groups = {
        f"group_{index}": {"targets": [target], "weights": weights, "format": formats[index]}
        for index, (target, weights) in enumerate(schemes.items())
    }
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    tensors, expected = {}, {}
    for index, (name, weights) in enumerate(zip(("up_proj", "down_proj", "gate_proj"), schemes.values(), strict=True)):
        parts = compressed(weight(), formats[index], **weights)
        layer = f"model.layers.0.mlp.{name}"
        tensors |= {f"{layer}.{part}": value for part, value in parts.items()}
        compressor = BaseCompressor.get_value_from_registry(formats[index])
        expected[f"{layer}.weight"] = compressor.decompress(parts, scheme_of(**weights))["weight"]
    checkpoint = opened(tmp_path, tensors, config)
    assert checkpoint.infos.keys() == expected.keys()
    for name, value in expected.items():
        require_same(checkpoint.read(name, device=CPU), value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (64, 64), (130, 128)])
def test_fp8_by_blocks(shape, dtype, tmp_path, slabs):
    parts = fp8(weight(*shape), (128, 128))
    converter = FP8BlockDequantizer(targets=["Linear"], dtype=getattr(torch, dtype))
    expected = converter.process(of_layer(parts))[f"{LAYER}.weight"]
    found = decoded(tmp_path, parts, FP8, dtype)
    require_same(found, expected)
    if not any(size % 128 for size in shape):
        reference = Fp8Dequantize(None)._dequantize_one(*parts.values(), output_dtype=getattr(torch, dtype))
        require_same(found, reference)


SCALES = {
    "per tensor": ((), "weight_scale_inv"),
    "per tensor, [1]": ((1,), "weight_scale"),
    "per channel": ((96, 1), "weight_scale"),
    "per channel, [O]": ((96,), "qscale_weight"),
}


@pytest.mark.parametrize("method", [{"quant_method": "fp8", "weight_block_size": None}, {"quant_method": "fbgemm_fp8"}])
@pytest.mark.parametrize("case", SCALES)
def test_fp8_with_other_scales(case, method, tmp_path, slabs):
    shape, name = SCALES[case]
    codes = weight().mul(40).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=torch.manual_seed(0)) + 0.1
    static = {"activation_scale": torch.tensor(2.0), "input_scale": torch.tensor(1.0)}
    found = decoded(tmp_path, {"weight": codes, name: scale, **static}, {**method, "activation_scheme": "static"})
    require_same(found, Fp8Dequantize(None)._dequantize_one(codes, scale.reshape(-1, 1), torch.bfloat16))


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_deepseek_v4(codes, as_bytes, tmp_path, slabs):
    """Layers in FP8 and experts in FP4, with scales that are powers of two."""
    shape = (128, 256) if codes == torch.int8 else (256, 512)
    generator = torch.manual_seed(0)
    values = torch.randint(-128, 127, shape, generator=generator, dtype=torch.int8).clamp(-120, 120)
    stored = values if codes == torch.int8 else values.float().div(10).to(codes)
    grid = (128, 16) if codes == torch.int8 else (2, 4)
    scale = torch.randint(115, 130, grid, generator=generator, dtype=torch.uint8)
    scale = scale if as_bytes else scale.view(torch.float8_e8m0fnu)
    found = decoded(tmp_path, {"weight": stored, "scale": scale}, {**FP8, "scale_fmt": "ue8m0", "expert_dtype": "fp4"})
    require_same(found, Fp8Dequantize(None)._dequantize_one(stored, scale, torch.bfloat16))


@pytest.mark.parametrize("scales", ["blocks", "experts", "model"])
def test_fused_experts_in_fp8(scales, tmp_path):
    """An expert alone is read like the same expert of all of them."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes = torch.randn(3, 256, 128, generator=torch.manual_seed(0)).to(torch.float8_e4m3fn)
    shape = {"blocks": (3, 2, 1), "experts": (3,), "model": ()}[scales]
    scale = torch.rand(shape, generator=torch.manual_seed(1)) + 0.5
    tensors = {name: codes, f"{name}_scale_inv": scale, f"{name}_activation_scale": torch.ones(3)}
    checkpoint = opened(tmp_path, tensors, FP8)
    assert list(checkpoint.infos) == [name]
    found = checkpoint.read(name, device=CPU)
    grid = scale if scales == "blocks" else scale.expand(3).reshape(3, 1, 1)
    require_same(found, Fp8Dequantize(None)._dequantize_one(codes, grid, torch.bfloat16))
    info = checkpoint.infos[name]
    assert isinstance(info, DerivedTensor)
    assert info.piecewise == (scales != "model")
    if info.piecewise:
        one = Checkpoint({"one": piece(info, 1)}, checkpoint.stored)
        require_same(one.read("one", device=CPU), found[1])


def test_fused_experts_of_llama_4_in_fp8(tmp_path):
    """`fbgemm_fp8` transposes fused experts, and has a scale for each output, in one of two shapes."""
    name = "model.layers.0.feed_forward.experts.down_proj"
    codes = torch.randn(2, 64, 64, generator=torch.manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 64, 1, generator=torch.manual_seed(1)) + 0.5
    for stored in (scale, scale.reshape(2, 1, 64)):
        checkpoint = opened(tmp_path, {name: codes, f"{name}_scale": stored}, {"quant_method": "fbgemm_fp8"})
        expected = (codes.float() * scale.reshape(2, 1, 64)).bfloat16()
        require_same(checkpoint.read(name, device=CPU), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_of_gpt_oss(dtype, tmp_path, slabs):
    name, generator = "model.layers.0.mlp.experts.gate_up_proj", torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 48, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 48, 4), generator=generator, dtype=torch.uint8)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(3, 48)}
    checkpoint = opened(tmp_path, tensors, {"quant_method": "mxfp4"}, dtype)
    assert checkpoint.tensors() == {name: (3, 128, 48), f"{name}_bias": (3, 48)}
    expected = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype))
    require_same(checkpoint.read(name, device=CPU), expected)
    one = Checkpoint({"one": piece(checkpoint.infos[name], 2)}, checkpoint.stored)
    require_same(one.read("one", device=CPU), expected[2])


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_nvfp4_of_modelopt(where, tmp_path, slabs):
    parts = modelopt_nvfp4(weight())
    converter = ModelOptNvfp4Converter(targets=["Linear"])
    shaped = {**parts, "weight_scale_2": parts["weight_scale_2"].reshape(1)}
    converted = {name.rpartition(".")[2]: value for name, value in converter.process(of_layer(shaped)).items()}
    expected = NVFP4PackedCompressor.decompress(converted, scheme_of(**NVFP4["weights"].model_dump()))["weight"]
    if where == "config.json":
        require_same(decoded(tmp_path, parts, MODELOPT), expected)
    else:
        (tmp_path / where).write_text('{"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}')
        scales = {"k_scale": torch.ones(()), "v_scale": torch.ones(())}
        require_same(decoded(tmp_path, {**parts, **scales}, {}), expected)


@pytest.mark.parametrize("shape", [(), (96,), (1, 1, 1, 1)])
def test_fp8_of_modelopt(shape, tmp_path):
    codes = weight().mul(40).to(torch.float8_e4m3fn)
    scale = torch.full(shape, 0.37)
    found = decoded(tmp_path, {"weight": codes, "weight_scale": scale}, {**MODELOPT, "quant_algo": "FP8"})
    require_same(found, (codes.float() * 0.37).bfloat16())


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shuffled", [True, False])
def test_gptq(version, bits, symmetric, shuffled, tmp_path, slabs):
    """The values are those of the formula, on codes that are unpacked in another way."""
    dense = weight(64, 128)
    dense[::3].abs_()  # zero points of 0
    parts = gptq(dense, bits, symmetric=symmetric, offset=int(version == "gptq"), shuffled=shuffled)
    group = parts["g_idx"].long()
    order = torch.argsort(group, stable=True) if not shuffled else torch.randperm(128, generator=torch.manual_seed(0))
    codes, scale, zero = integers(dense[:, order], bits, 2, symmetric=symmetric)
    codes = codes[:, torch.argsort(order)]
    expected = ((codes - zero[:, group]) * scale[:, group]).bfloat16()
    config = {**GPTQ, "bits": bits, "checkpoint_format": version}
    require_same(decoded(tmp_path, parts, config), expected)
    if not shuffled:
        del parts["g_idx"]
        require_same(decoded(tmp_path, parts, config), expected)


def test_gptq_with_other_bits_in_a_layer(tmp_path):
    parts = gptq(weight(), 8)
    expected = decoded(tmp_path, parts, {**GPTQ, "bits": 8})
    require_same(decoded(tmp_path, parts, {**GPTQ, "dynamic": {"+:.*up_proj": {"bits": 8}}}), expected)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("where", ["config.json", "quant_config.json"])
def test_awq(zero_point, where, tmp_path, slabs):
    parts = awq(weight(), zero_point=zero_point)
    converted = AutoAWQConverter(group_size=64, zero_point=zero_point).process(of_layer(parts))
    state = {name.rpartition(".")[2]: value for name, value in converted.items()}
    scheme = scheme_of(num_bits=4, strategy="group", group_size=64, symmetric=not zero_point)
    expected = PackedQuantizationCompressor.decompress(state, scheme)["weight"].bfloat16()
    if where == "config.json":
        require_same(decoded(tmp_path, parts, {**AWQ, "zero_point": zero_point}), expected)
    else:
        described = f'{{"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": {str(zero_point).lower()}}}'
        (tmp_path / where).write_text(described)
        require_same(decoded(tmp_path, parts, {}), expected)


def test_other_tensors_stay_as_they_are(tmp_path):
    """Names that end like those of parts are only parts if they have codes."""
    others = {
        "model.embed_tokens.weight": torch.ones(4, 4),
        "logit_scale": torch.ones(()),
        "model.layers.0.router.scale": torch.ones(4),
        "model.layers.0.mlp.down_proj.weight": weight(),
        "model.position_ids": torch.arange(4),
    }
    checkpoint = opened(tmp_path, {**of_layer(fp8(weight(), (128, 128))), **others}, FP8)
    assert checkpoint.infos.keys() == {*others, f"{LAYER}.weight"}
    assert all(checkpoint.infos[name] is checkpoint.stored[name] for name in others)
    plain = read_header(tmp_path / "model.safetensors")
    assert decoded_tensors(tmp_path, {}, plain) is plain


def test_codes_without_a_scale_are_not_read(tmp_path):
    checkpoint = opened(tmp_path, of_layer({"weight": weight().to(torch.float8_e4m3fn)}), FP8)
    with pytest.raises(InputError, match=r"has dtype F8_E4M3, which is copied but not computed with\. Convert it"):
        checkpoint.read(f"{LAYER}.weight", device=CPU)


def test_quantized_inputs_are_noticed():
    dynamic = ct("int-quantized", num_bits=8, strategy="channel")
    dynamic["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    weights_only = {"quantization": {"quant_algo": "W4A16_NVFP4"}, "quant_method": "modelopt"}
    assert all(map(quantizes_inputs, (dynamic, FP8, MODELOPT, {"quant_method": "fbgemm_fp8"})))
    assert not any(map(quantizes_inputs, (ct("pack-quantized", num_bits=4), GPTQ, AWQ, weights_only)))


PACKED = compressed(weight(), "pack-quantized", num_bits=4, strategy="group", group_size=32)
PACKED_CONFIG = ct("pack-quantized", num_bits=4, strategy="group", group_size=32)
NVFP4_PARTS = modelopt_nvfp4(weight())


def but(parts: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    """Parts with other values; None leaves one out."""
    return {name: value.contiguous() for name, value in {**parts, **changes}.items() if value is not None}


FROM_HEADERS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "fp8: shape of the scale": (
        but(fp8(weight(), (128, 128)), weight_scale_inv=torch.ones(2, 3)),
        FP8,
        r'weight_scale_inv": has shape \[2, 3\], but must have \[1, 1\] or',
    ),
    "fp8: dtype of the scale": (
        but(fp8(weight(), (128, 128)), weight_scale_inv=torch.ones(1, 1, dtype=torch.int32)),
        FP8,
        r'weight_scale_inv": has dtype I32, but must have BF16 or F16 or F32 or F8_E8M0 or U8\. Download it again, or',
    ),
    "fp8: no values": (
        {"weight": torch.ones(96, 0).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 0)},
        FP8,
        r"has shape \[(96|1), 0\], without values\.",
    ),
    "fp8: scale without weight": ({"weight_scale_inv": torch.ones(1, 1)}, FP8, r"whose codes are missing\. Download"),
    "fp8: dense weight with scale": (
        {"weight": weight(), "weight_scale": torch.ones(())},
        FP8,
        r'is a scale, but ".*up_proj\.weight" is stored as BF16, which is not quantized\.',
    ),
    "fp8: nothing in FP8": (
        {"weight": weight()},
        FP8,
        r"quantized \(fp8\) by this description, but none of its weights is",
    ),
    "fp8: block size": ({}, {**FP8, "weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\] is not two sizes"),
    "packed: scale missing": (but(PACKED, weight_scale=None), PACKED_CONFIG, r"its weight_scale is missing\. Download"),
    "packed: shape missing": (but(PACKED, weight_shape=None), PACKED_CONFIG, r"its weight_shape is missing\."),
    "packed: shape of the scale": (
        but(PACKED, weight_scale=torch.ones(96, 5)),
        PACKED_CONFIG,
        r'weight_packed": has shape \[96, 16\], but must have \[96, 20\]',
    ),
    "packed: rows of the scale": (
        but(PACKED, weight_scale=torch.ones(95, 4)),
        PACKED_CONFIG,
        r'weight_scale": has shape \[95, 4\], but must have \[96, 4\]',
    ),
    "packed: dtype": (
        but(PACKED, weight_packed=PACKED["weight_packed"].long()),
        PACKED_CONFIG,
        r'weight_packed": has dtype I64, but must have I32\.',
    ),
    "packed: zero point missing": (
        PACKED,
        ct("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
        r"its weight_zero_point is missing\.",
    ),
    "packed: no groups": ({}, {**PACKED_CONFIG, "config_groups": {}}, "its quantization_config has no config_groups"),
    "packed: not a scheme": (
        {},
        ct("pack-quantized", num_bits="four"),
        "compressed-tensors cannot read its quantization_config",
    ),
    "packed: no bits": ({}, ct("pack-quantized", num_bits=0, strategy="channel"), "its num_bits, 0, are not 1 to 8"),
    "packed: other format": ({}, ct("mxfp6-pack-quantized", num_bits=6), "its format mxfp6-pack-quantized .* is not"),
    "packed: transform": (
        {},
        {**PACKED_CONFIG, "transform_config": {"config_groups": {"R1": {}}}},
        "its transform_config describes another change of the weights",
    ),
    "packed: sparse": (
        {},
        {**PACKED_CONFIG, "sparsity_config": {"format": "sparse-24-bitmask"}},
        "its sparsity_config describes another change of the weights",
    ),
    "packed: weight beside codes": (but(PACKED, weight=weight()), PACKED_CONFIG, "is stored beside its quantized form"),
    "nvfp4: second scale missing": (but(NVFP4_PARTS, weight_scale_2=None), MODELOPT, "its weight_scale_2 is missing"),
    "nvfp4: dtype of the scale": (
        but(NVFP4_PARTS, weight_scale=torch.ones(96, 8)),
        MODELOPT,
        r'weight_scale": has dtype F32, but must have F8_E4M3',
    ),
    "nvfp4: no algorithm": (NVFP4_PARTS, {"quant_method": "modelopt"}, "its quant_algo None is not one of FP8"),
    "nvfp4: factor for inputs": (
        but(NVFP4_PARTS, pre_quant_scale=torch.ones(128)),
        MODELOPT,
        r'pre_quant_scale": is a factor for the inputs of a quantized layer',
    ),
    "gptq: bits": ({}, {**GPTQ, "bits": 5}, "its bits, 5, are not 2, 3, 4 or 8"),
    "gptq: no bits": ({}, {"quant_method": "gptq"}, "its bits, None, are not 2, 3, 4 or 8"),
    "gptq: marlin": ({}, {**GPTQ, "checkpoint_format": "marlin"}, "its checkpoint_format 'marlin' is not gptq"),
    "gptq: zero points missing": (but(gptq(weight()), qzeros=None), GPTQ, "its qzeros is missing"),
    "gptq: codes missing": (but(gptq(weight()), qweight=None), GPTQ, "whose codes are missing"),
    "gptq: other bits": (gptq(weight(), 8), GPTQ, r'qzeros": has shape \[2, 24\], but must have \[2, 12\]'),
    "awq: bits": ({}, {**AWQ, "bits": 3}, "its bits, 3, are not 4"),
    "awq: version": ({}, {**AWQ, "version": "gemv"}, "its version 'gemv' is not gemm"),
    "awq: zero points missing": (but(awq(weight()), qzeros=None), AWQ, "its qzeros is missing"),
    "awq: scaled activation": ({"scales": torch.ones(8)}, AWQ, "whose codes are missing"),
    "another method": ({}, {"quant_method": "bitsandbytes"}, r"quantized \(bitsandbytes\), which is not decoded\."),
    "no method": (
        {},
        {"bits": 4},
        r"quantized \(None\), which is not decoded\. Give the original model, or one in awq",
    ),
}


@pytest.mark.parametrize("case", FROM_HEADERS)
def test_what_headers_show_is_refused_by_name(case, tmp_path):
    parts, quantization, text = FROM_HEADERS[case]
    with pytest.raises(InputError, match=text) as refused:
        opened(tmp_path, of_layer(parts), quantization)
    where = "model.safetensors" if parts else "config.json"
    assert str(refused.value).startswith((f"{tmp_path}/{where}: ", f"{tmp_path}/config.json: "))


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A tensor whose first value is replaced."""
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


INT4 = compressed(weight(), "int-quantized", num_bits=4, strategy="channel")
WHEN_READ: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "fp8: NaN": (but(fp8(weight(), (128, 128)), weight_scale_inv=torch.full((1, 1), torch.nan)), FP8, "a scale is not"),
    "fp8: negative": (
        but(fp8(weight(), (128, 128)), weight_scale_inv=-torch.ones(1, 1)),
        FP8,
        r"a scale is negative \(-1\)",
    ),
    "e8m0: NaN": (
        {"weight": torch.ones(32, 16, dtype=torch.int8), "scale": torch.full((32, 1), 255, dtype=torch.uint8)},
        FP8,
        "a scale is not finite",
    ),
    "packed: infinite": (
        but(PACKED, weight_scale=with_value(PACKED["weight_scale"], torch.inf)),
        PACKED_CONFIG,
        "a scale is not finite",
    ),
    "packed: zero": (
        but(PACKED, weight_scale=with_value(PACKED["weight_scale"], 0)),
        PACKED_CONFIG,
        "a scale is zero",
    ),
    "packed: shape": (
        but(PACKED, weight_shape=torch.tensor([96, 120])),
        PACKED_CONFIG,
        r"weight_shape is \[96, 120\], but the codes are those of \[96, 128\]",
    ),
    "int4 in int8: codes": (
        but(INT4, weight=with_value(INT4["weight"], 8)),
        ct("int-quantized", num_bits=4, strategy="channel"),
        "codes are from -8 to 8, but 4 bits hold -8 to 7",
    ),
    "nvfp4: scale of the tensor": (
        but(NVFP4_PARTS, weight_scale_2=torch.zeros(())),
        MODELOPT,
        "a weight_scale_2 is zero",
    ),
    "gptq: infinite": (
        but(gptq(weight()), scales=with_value(gptq(weight())["scales"], torch.inf)),
        GPTQ,
        "a scale is not finite",
    ),
    "gptq: group": (
        but(gptq(weight()), g_idx=with_value(gptq(weight())["g_idx"], 2)),
        GPTQ,
        "g_idx has the group 2, but there are 2",
    ),
    "gptq: group below zero": (
        but(gptq(weight()), g_idx=with_value(gptq(weight())["g_idx"], -1)),
        GPTQ,
        "g_idx has the group -1, but there are 2",
    ),
    "awq: negative": (
        but(awq(weight()), scales=with_value(awq(weight())["scales"], -1)),
        AWQ,
        r"a scale is negative \(-1\)",
    ),
}


@pytest.mark.parametrize("case", WHEN_READ)
def test_values_that_no_program_writes_are_refused_when_they_are_read(case, tmp_path):
    parts, quantization, text = WHEN_READ[case]
    checkpoint = opened(tmp_path, of_layer(parts), quantization)
    start = f'{tmp_path}/model.safetensors: tensor "{LAYER}.weight": {text}'
    with pytest.raises(InputError, match=text.replace("[", "[")) as refused:
        checkpoint.read(f"{LAYER}.weight", device=CPU)
    assert str(refused.value).startswith(start[: start.index(text)])
    assert str(refused.value).endswith(". Download it again, or repair the model.")


def test_scales_that_programs_write_are_read(tmp_path):
    """Integers with negative scales, and groups of FP4 whose scale is too small for FP8."""
    negative = but(PACKED, weight_scale=-PACKED["weight_scale"])
    require_same(decoded(tmp_path, negative, PACKED_CONFIG), -decoded(tmp_path, PACKED, PACKED_CONFIG))
    scale = NVFP4_PARTS["weight_scale"].clone()
    scale[0] = 0
    assert not decoded(tmp_path, but(NVFP4_PARTS, weight_scale=scale), MODELOPT)[0].any()


def test_every_decoder_is_tested():
    tested = {"fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "modelopt", "modelopt_fp4", "gptq", "awq"}
    assert set(DECODERS) == tested
