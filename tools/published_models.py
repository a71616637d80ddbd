"""Tiny random models as well-known models are published: the names, the dtypes, the quantization and the further blocks of the original.

transformers writes the published names of most models (`save_pretrained`); `renames` has the rest. What is published quantized is quantized
here with the scales of the original: FP8 in blocks of 128 x 128, INT4 in groups of 32, and so on. The blocks at the edge of most weights
are cut, as in the originals. The description in config.json is the published one, with the settings that matter for reading.

The layouts are those that transformers, compressed-tensors and vLLM read. Rows whose published layout is not certain in some point say so
in a comment.
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from architecture_models import NotBuildableError, auto_class, logits_of, make_model, segments, tiny_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from quantized import compressed, fp8, modelopt_nvfp4, scheme_of

BLOCK = 128
_FP8_MAX, _FP4_MAX = 448.0, 6.0
_FP4_VALUES = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
_FLOAT32 = re.compile(r"(e_score_correction_bias|A_log|\.expert_bias|hc_\w+|attn_sink|\.ape)$")
"""Names of tensors that are published in float32."""
_FP8_BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
_BY_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def _fp8_block(name, value):
    """FP8 with a float32 scale for each block."""
    parts = fp8(value, (BLOCK, BLOCK))
    return _whole(name, parts), _of_blocks(parts["weight"], parts["weight_scale_inv"])


def _fp8_power(name, value):
    """FP8 with a power of two as the scale of each block, which is called `NAME.scale` (DeepSeek V4)."""
    rows, columns = value.shape
    scale = fp8(value, (BLOCK, BLOCK))["weight_scale_inv"].log2().ceil().exp2()
    expanded = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    codes = (value.float() / expanded).to(torch.float8_e4m3fn)
    return {name: codes, f"{name.removesuffix('weight')}scale": scale.to(torch.float8_e8m0fnu)}, _of_blocks(
        codes, scale
    )


def _fp8_tensor(name, value):
    """FP8 with one scale, for each expert if the weight is that of fused experts, and a scale for the inputs."""
    kept = range(1, value.dim()) if value.dim() == 3 else range(value.dim())
    scale = value.float().abs().amax(tuple(kept), keepdim=value.dim() == 3) / _FP8_MAX
    codes = (value.float() / scale).to(torch.float8_e4m3fn)
    inputs = (
        f"{name.removesuffix('.weight')}.activation_scale" if name.endswith(".weight") else f"{name}_activation_scale"
    )
    decoded = (codes.float() * scale).bfloat16()
    return {name: codes, f"{name}_scale_inv": scale, inputs: torch.tensor(1.0)}, decoded


def _fp8_modelopt(name, value):
    """FP8 of ModelOpt with one scale, and a scale for the inputs."""
    scale = value.float().abs().amax() / _FP8_MAX
    codes = (value.float() / scale).to(torch.float8_e4m3fn)
    stem = name.removesuffix(".weight")
    return {name: codes, f"{name}_scale": scale, f"{stem}.input_scale": torch.tensor(1.0)}, (
        codes.float() * scale
    ).bfloat16()


def _fp4(value):
    """Codes of FP4, two in a byte, uint8 [..., I / 2], and exponents of the scales of groups of 32, int [..., I / 32]."""
    grouped = value.float().reshape(*value.shape[:-1], -1, 32)
    exponent = (grouped.abs().amax(-1) / _FP4_MAX).log2().ceil()
    scaled = grouped / exponent.exp2()[..., None]
    codes = (scaled.abs()[..., None] - _FP4_VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    pairs = codes.reshape(*value.shape[:-1], -1, 2).to(torch.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4, exponent


def _fp4_values(codes):
    """Values, float32 [..., 2 N], of codes [..., N]."""
    both = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    return torch.where(both > 7, -1.0, 1.0) * _FP4_VALUES[both % 8]


def _fp4_power(name, value):
    """FP4 with a power of two as the scale of each group of 32, which is called `NAME.scale` (DeepSeek V4)."""
    codes, exponent = _fp4(value)
    scale = exponent.exp2()
    decoded = (_fp4_values(codes) * scale.repeat_interleave(32, -1)).bfloat16()
    return {
        name: codes.view(torch.int8),
        f"{name.removesuffix('weight')}scale": scale.to(torch.float8_e8m0fnu),
    }, decoded


def _mxfp4(name, value):
    """MXFP4 of gpt-oss: fused experts [E, I, O] in blocks of 32 inputs, for each output."""
    codes, exponent = _fp4(value.transpose(1, 2))
    blocks = codes.reshape(*exponent.shape, 16)
    scales = (exponent + 127).to(torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, convert_moe_packed_tensors(blocks, scales)


def _nvfp4(name, value):
    """NVFP4 of ModelOpt."""
    parts = modelopt_nvfp4(value)
    scale = (parts["weight_scale"].float() * parts["weight_scale_2"]).repeat_interleave(16, -1)
    return _whole(name, parts), (_fp4_values(parts["weight"]) * scale).bfloat16()


def _compressed(format_name, **weights):
    """Function that compresses a weight with compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor

    def encode(name, value):
        parts = compressed(value.bfloat16(), format_name, **weights)
        compressor = BaseCompressor.get_value_from_registry(format_name)
        # INT4 is evaluated as results are: with `code * scale` in float32
        wide = dict(parts) | {"weight_scale": parts["weight_scale"].float()}
        decoded = compressor.decompress(dict(parts) if weights["type"] == "float" else wide, scheme_of(**weights))[
            "weight"
        ]
        return _whole(name, parts), decoded

    return encode


def _whole(name, parts):
    """Parts of a layer by their full names."""
    return {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}


def _of_blocks(codes, scale):
    """The weight, bf16 [O, I], of codes with a scale for each block."""
    rows, columns = codes.shape
    expanded = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (codes.float() * expanded).bfloat16()


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def _compressed_config(format_name, weights, ignore, inputs=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


@dataclass(frozen=True, kw_only=True)
class Published:
    """How a model is published."""

    of: str
    """Type or variant in `architecture_models.py`."""
    storage: str = "bf16"
    """Description for the table."""
    encode: Mapping[str, Any] = field(default_factory=dict)
    """Function that quantizes a tensor, by a pattern of names; the first that matches is used."""
    quantization: Mapping[str, Any] | None = None
    """The `quantization_config`."""
    place: str = ""
    """Part of config.json in which it stands."""
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns of names that transformers does not write as they are published, and their replacements."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of config.json, by path. Their values are those of the original, which transformers may not know."""
    further: str = ""
    """Kind of the further block that predicts more tokens: `NextN` or `mtp`, after the names in the index."""
    split: bool = False
    """Whether fused experts [E, I, O] are published with a tensor for each expert."""


_EXCEPT = r"(?!.*(?:norm|gate\.weight|router|eh_proj|embed|shared_head|weights_proj|conv1d))"
_LINEAR = rf"{_EXCEPT}.*layers\.\d+\..*\.weight$"
"""Matches weights of the linear layers of blocks, without routers, indexer weights, and what is around a further block."""
_OF_TEXT = r"(?!.*(?:vision|visual))"


def _fp8_row(
    of, *, kept="(?!)", storage="FP8, blocks of 128 x 128", skipped=(), key="modules_to_not_convert", **options
):
    """Row of a model in FP8 with a scale for each block.

    Args:
        kept: pattern of weights that are not quantized.
        skipped: names of modules that are not quantized, in the description.
    """
    quantization = _FP8_BLOCKS | ({key: list(skipped)} if skipped else {})
    pattern = rf"(?!.*(?:{kept})){_OF_TEXT}{_LINEAR}"
    return Published(of=of, storage=storage, encode={pattern: _fp8_block}, quantization=quantization, **options)


_AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
_KIMI_IGNORE = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
_KIMI_NAMES = ((r"^language_model\.model\.blocks\.", "language_model.model.layers."),)
_V4_NAMES = (
    (r"^model\.embed_tokens\.", "embed."),
    (r"^model\.hc_head\.", ""),
    (r"^model\.", ""),
    (r"^hc_(fn|base|scale)$", r"hc_head_\1"),
)
_SMALL = ("linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.conv1d", "mlp.gate", "mlp.shared_expert_gate")


def _skipped(prefix, *leaves):
    """Names of modules of the tiny model that are not converted."""
    return ("lm_head", *(f"{prefix}layers.{index}.{leaf}" for index in range(4) for leaf in leaves))


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "DeepSeek V3, V3.1, R1": _fp8_row("deepseek_v3", further="NextN"),
        # V3.2 in the form that transformers reads; the published indexer has the scales of its keys in FP8 too
        "DeepSeek V3.2": _fp8_row("deepseek_v32", further="NextN", config={"model_type": "deepseek_v32"}),
        # whether the matrices of compressors are quantized is not certain; here they are not
        "DeepSeek V4": Published(
            of="deepseek_v4",
            storage="FP8, blocks with powers of two; experts FP4",
            encode={
                r".*ffn\.experts\.\d+\.w\d\.weight$": _fp4_power,
                r".*(?:attn\.w\w+|indexer\.wq_b|shared_experts\.w\d)\.weight$": _fp8_power,
            },
            quantization=_FP8_BLOCKS | {"scale_fmt": "ue8m0"},
            renames=_V4_NAMES,
        ),
        "Kimi K2": _fp8_row(
            "deepseek_v3",
            config={"model_type": "kimi_k2", "auto_map": _AUTO_MAP, "num_nextn_predict_layers": 0},
        ),
        "Kimi K2.5, K2.6": Published(
            of="kimi_k25 untied",
            storage="experts INT4 (compressed-tensors)",
            encode={r".*mlp\.experts\.\d+\..*\.weight$": _compressed("pack-quantized", **_INT4)},
            quantization=_compressed_config("pack-quantized", _INT4, _KIMI_IGNORE),
            place="text_config",
            renames=_KIMI_NAMES,
            config={"text_config.model_type": "kimi_k2", "text_config.auto_map": _AUTO_MAP},
        ),
        "Kimi Linear": Published(
            of="kimi_linear", renames=((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),)
        ),
        "GLM 4.5, 4.6, 4.7": Published(of="glm4_moe", further="NextN"),
        "GLM 4.5 FP8": Published(
            of="glm4_moe",
            storage="FP8 per channel (compressed-tensors)",
            encode={_LINEAR: _compressed("float-quantized", **_CHANNEL)},
            quantization=_compressed_config(
                "float-quantized", _CHANNEL, [*_skipped("model.", "mlp.gate"), "model.layers.4.eh_proj"], _BY_TOKEN
            ),
            further="NextN",
        ),
        "GLM 5": Published(of="glm_moe_dsa", further="NextN"),
        "GLM 5 FP8": _fp8_row(
            "glm_moe_dsa",
            skipped=_skipped("model.", "mlp.gate", "self_attn.indexers_proj", "self_attn.indexer.weights_proj"),
            further="NextN",
        ),
        "GLM 5.x, shared indexers": Published(of="glm_moe_dsa shared indexers", further="NextN"),
        "Qwen3": Published(of="qwen3"),
        "Qwen3 FP8": _fp8_row("qwen3"),
        "Qwen3 MoE FP8": _fp8_row("qwen3_moe", skipped=_skipped("model.", "mlp.gate", "input_layernorm")),
        "Qwen3-Next": Published(of="qwen3_next", further="mtp"),
        # which of the small projections of linear attention are quantized is not certain
        "Qwen3-Next FP8": _fp8_row(
            "qwen3_next",
            kept="in_proj_ba",
            skipped=_skipped("model.", "linear_attn.in_proj_ba", *_SMALL),
            further="mtp",
        ),
        "Qwen3.5, 3.6": Published(of="qwen3_5", further="mtp"),
        "Qwen3.5 FP8": _fp8_row(
            "qwen3_5",
            kept="in_proj_[ab]\\.",
            skipped=_skipped("model.language_model.", *_SMALL),
            further="mtp",
        ),
        "Qwen3.5 MoE, 3.6 MoE": Published(of="qwen3_5_moe fused", storage="bf16, fused experts", further="mtp"),
        "Qwen3.5 MoE FP8": _fp8_row(
            "qwen3_5_moe",
            kept="in_proj_[ab]\\.",
            skipped=_skipped("model.language_model.", *_SMALL),
            further="mtp",
        ),
        "Qwen3-VL MoE": Published(of="qwen3_vl_moe", storage="bf16, fused experts"),
        # experts of the original are [E, I, O], as here; the scales of FP8 are those of Qwen3-VL-235B-A22B-Instruct-FP8 as far as known
        "MiniMax M2": _fp8_row("minimax_m2", skipped=("gate", "e_score_correction_bias", "lm_head")),
        "MiniMax M3": Published(of="minimax_m3_vl"),
        "gpt-oss": Published(
            of="gpt_oss",
            storage="experts MXFP4",
            encode={r".*mlp\.experts\.(gate_up|down)_proj$": _mxfp4},
            quantization={
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            },
        ),
        "Llama 4": Published(of="llama4", storage="bf16, fused experts [E, I, O]"),
        # the FP8 Maverick has a tensor for each expert
        "Llama 4 FP8": Published(
            of="llama4",
            storage="experts FP8 per channel (compressed-tensors)",
            encode={r".*feed_forward\.experts\.(gate_up|down)_proj$": _compressed("float-quantized", **_CHANNEL)},
            quantization=_compressed_config(
                "float-quantized",
                _CHANNEL,
                [
                    "re:.*lm_head",
                    "re:.*self_attn",
                    "re:.*router",
                    "re:.*vision_model",
                    "re:.*multi_modal_projector",
                    "re:.*shared_expert",
                ],
                _BY_TOKEN,
            ),
            split=True,
        ),
        # the shape of the scales of fused experts is not certain
        "Mistral Small 4": Published(
            of="mistral3 with mistral4",
            storage="FP8 per tensor, fused experts",
            encode={rf"{_OF_TEXT}{_LINEAR}": _fp8_tensor, r".*mlp\.experts\.(gate_up|down)_proj$": _fp8_tensor},
            quantization={
                "quant_method": "fp8",
                "activation_scheme": "static",
                "weight_block_size": None,
                "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
            },
        ),
        "Gemma 3n": Published(of="gemma3n_text"),
        "Gemma 4 E2B": Published(of="gemma4 shared keys"),
        "Gemma 4 31B": Published(of="gemma4 dense"),
        "Gemma 4 26B-A4B": Published(of="gemma4 experts", storage="bf16, fused experts"),
        "Nemotron 3": Published(of="nemotron_h"),
        "Nemotron 3 FP8": Published(
            of="nemotron_h",
            storage="FP8 per tensor (ModelOpt)",
            encode={
                rf"{_EXCEPT}.*mixer\.(?:experts|shared_experts|in_proj|out_proj|up_proj|down_proj).*\.weight$": _fp8_modelopt
            },
            quantization={"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*conv1d*"]},
        ),
        "Nemotron 3 NVFP4": Published(
            of="nemotron_h",
            storage="experts NVFP4, others FP8 (ModelOpt)",
            encode={
                r".*mixer\.(?:experts\.\d+|shared_experts)\..*\.weight$": _nvfp4,
                r".*mixer\.(?:in_proj|out_proj)\.weight$": _fp8_modelopt,
            },
            quantization={"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["lm_head"]},
        ),
        "Step 3.7": Published(of="step3p7", storage="bf16, fused experts"),
        "LongCat Flash": Published(of="longcat_flash", further="mtp"),
        "MiMo V2 Flash": _fp8_row(
            "mimo_v2_flash", kept="o_proj", skipped=_skipped("model.", "self_attn.o_proj"), key="ignored_layers"
        ),
        "Granite 4 hybrid": Published(of="granitemoehybrid", storage="bf16, fused experts"),
        "Granite 4 dense": Published(of="granitemoehybrid dense"),
        "Granite 3 MoE": Published(of="granitemoe", storage="bf16, fused experts"),
        "Hunyuan A13B": Published(of="hunyuan_v1_moe"),
        "Ernie 4.5": Published(of="ernie4_5"),
        "Ernie 4.5 MoE": Published(of="ernie4_5_moe"),
        "Ernie 4.5 VL MoE": Published(of="ernie4_5_vl_moe"),
        "Jamba": Published(of="jamba"),
        "Falcon H1": Published(of="falcon_h1"),
        "Zamba 2": Published(of="zamba2"),
        "LFM2": Published(of="lfm2"),
        "LFM2 MoE": Published(of="lfm2_moe"),
        "OLMo hybrid": Published(of="olmo_hybrid"),
        # the architecture is not in transformers
        "Kimi K3": Published(of="deepseek_v3", config={"model_type": "kimi_k3", "auto_map": _AUTO_MAP}),
    }
)
"""Models by name."""


def make_published(name, folder):
    """Write a model as it is published into `source`, and its weights in full precision, token ids and reference logits.

    `dense` holds the same weights in full precision, and the reference logits are those of transformers for it.

    Args:
        name: key of `PUBLISHED`.
        folder: folder to write.

    Raises:
        NotBuildableError: transformers cannot make, run, save or load the model.
    """
    row = PUBLISHED[name]
    shutil.rmtree(folder, ignore_errors=True)
    make_model(row.of, folder)
    made, dense = folder / "source", folder / "dense"
    tensors = {name: value for shard in made.glob("*.safetensors") for name, value in load_file(shard).items()}
    config = json.loads((made / "config.json").read_text())
    tensors = {_renamed(row, name): value for name, value in tensors.items()}
    tensors |= _further(row, tensors, config)
    tensors = {name: _as_published(name, value) for name, value in tensors.items()}
    stored, decoded = _encoded(row, tensors)
    if row.encode and len(stored) == len(tensors):
        raise ValueError(f"{name}: no tensor is quantized")
    _set_dtype(config)
    _write(dense, decoded, config)
    published = json.loads(json.dumps(config))
    for path, value in row.config.items():
        part, key = _part(published, path)
        part[key] = value
    if row.quantization is not None:
        part, key = _part(published, f"{row.place}.quantization_config".lstrip("."))
        part[key] = row.quantization | _named_layers(row, stored)
    for path in made.glob("*.safetensors*"):
        path.unlink()
    _write(made, stored, published)
    np.save(folder / "reference.npy", reference_logits(row, folder).numpy())


@torch.no_grad()
def transformers_logits(row, checkpoint, folder, *, dtype):
    """Logits float32 [N, S, V] that transformers computes in float32, after it has loaded a checkpoint in a dtype.

    Args:
        row: how the model is published.
        checkpoint: folder with config.json and the weights.
        folder: folder with the token ids.
        dtype: dtype of the weights.

    Raises:
        NotBuildableError: a weight is missing.
    """
    return logits_of(nn.Module.float(_loaded(row, checkpoint, dtype)).eval(), row.of, segments(folder))


@torch.no_grad()
def reference_logits(row, folder):
    """Logits float32 [N, S, V] that transformers computes in float32 for the weights in `dense`.

    Values that are not stored, such as the factor of the embeddings of Gemma, are those of a model in bf16. Tensors that are stored in
    float32 are not rounded.
    """
    model = _loaded(row, folder / "dense", torch.bfloat16).float().eval()
    model.load_state_dict(_loaded(row, folder / "dense", torch.float32).state_dict())
    return logits_of(model, row.of, segments(folder))


def _loaded(row, checkpoint, dtype):
    """A model that transformers loads in a dtype.

    Raises:
        NotBuildableError: a weight is missing.
    """
    auto = auto_class(tiny_config(row.of))
    model, loaded = auto.from_pretrained(checkpoint, dtype=dtype, device_map="cpu", output_loading_info=True)
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        raise NotBuildableError(
            f"load: {min(map(str, loaded['missing_keys'] or loaded['mismatched_keys']))} is missing"
        )
    return model


def _encoded(row, tensors):
    """Stored tensors, and the tensors of the same model in full precision."""
    stored, decoded = {}, {}
    for name, value in tensors.items():
        encode = next((encode for pattern, encode in row.encode.items() if re.match(pattern, name)), None)
        match = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name) if row.split else None
        if encode is None:
            stored[name] = decoded[name] = value
        elif match is None:
            parts, decoded[name] = encode(name, value)
            stored |= parts
        else:
            parts, decoded[name] = _split(encode, match[1], match[2], value)
            stored |= parts
    return stored, decoded


def _split(encode, experts, kind, value_EIO):
    """Stored tensors of separate experts, and the fused tensor with their values."""
    leaves = ("gate_proj", "up_proj") if kind == "gate_up" else ("down_proj",)
    stored, fused = {}, []
    for number, value_IO in enumerate(value_EIO):
        halves = []
        for leaf, part_IO in zip(leaves, value_IO.chunk(len(leaves), 1), strict=True):
            parts, decoded_OI = encode(f"{experts}.{number}.{leaf}.weight", part_IO.T.contiguous())
            stored |= parts
            halves.append(decoded_OI.T)
        fused.append(torch.cat(halves, 1))
    return stored, torch.stack(fused)


def _renamed(row, name):
    for pattern, replacement in row.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _as_published(name, value):
    keeps = not value.is_floating_point() or _FLOAT32.search(name)
    return (value if keeps else value.bfloat16()).contiguous()


def _further(row, tensors, config):
    """Tensors of the further block, which has the shapes of the last one."""
    if not row.further:
        return {}
    generator = torch.Generator().manual_seed(1)
    last = {name: value for name, value in tensors.items() if re.search(r"(?<!mtp\.)layers\.3\.", name)}
    text = config.get("text_config", config)
    wide, vocabulary = text["hidden_size"], text["vocab_size"]
    block = "model.layers.4." if row.further == "NextN" else "mtp.layers.0."
    made = {re.sub(r".*layers\.3\.", block, name): value for name, value in last.items()}
    if row.further == "NextN":
        config["num_nextn_predict_layers"] = 1
        shapes = {
            "model.layers.4.enorm.weight": (wide,),
            "model.layers.4.hnorm.weight": (wide,),
            "model.layers.4.eh_proj.weight": (wide, 2 * wide),
            "model.layers.4.shared_head.norm.weight": (wide,),
            "model.layers.4.shared_head.head.weight": (vocabulary, wide),
            "model.layers.4.embed_tokens.weight": (vocabulary, wide),
        }
    else:
        shapes = {
            "mtp.fc.weight": (wide, 2 * wide),
            "mtp.norm.weight": (wide,),
            "mtp.pre_fc_norm_embedding.weight": (wide,),
            "mtp.pre_fc_norm_hidden.weight": (wide,),
        }
    shapes |= {name: tuple(value.shape) for name, value in made.items()}
    return {name: 0.08 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _named_layers(row, stored):
    """Scheme of each layer by its name, in the descriptions of ModelOpt that mix schemes."""
    if row.quantization.get("quant_algo") != "MIXED_PRECISION":
        return {}
    layers = {}
    for name in stored:
        stem, _, part = name.rpartition(".")
        if part == "weight_scale_2":
            layers[stem] = {"quant_algo": "NVFP4", "group_size": 16}
        elif part == "weight_scale":
            layers.setdefault(stem, {"quant_algo": "FP8"})
    return {"quantized_layers": layers}


def _set_dtype(part):
    for key, value in part.items():
        if isinstance(value, dict):
            _set_dtype(value)
        elif key == "dtype" and value is not None:
            part[key] = "bfloat16"


def _part(config, path):
    *parts, key = path.split(".")
    for name in parts:
        config = config[name]
    return config, key


def _write(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
