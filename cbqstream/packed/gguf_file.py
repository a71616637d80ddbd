"""A quantized model as one GGUF file for llama.cpp, written with the gguf package: metadata, tokenizer, tensor names and blocks.

Tensors are read one at a time. Embeddings, the head and layers in full precision keep their dtype. Norms and biases are stored in float32.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.families import FAMILIES, GgufArchitecture, family_of
from cbqstream.packed.gguf_blocks import block_kind, encode_blocks
from cbqstream.packed.packed_checkpoint import CPU, PackedCheckpoint

_DTYPES = {
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.float32: gguf.GGMLQuantizationType.F32,
}
_PATTERNS = {
    # names of pre-tokenizers in llama.cpp, and the pattern in tokenizer.json that identifies each
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_NOT_WEIGHTS = (".rotary_emb.inv_freq",)
"""Ends of the names of tensors that old checkpoints contain and that llama.cpp computes itself."""


def write_gguf(path: Path, folder: Path, config: Mapping[str, Any], source: PackedCheckpoint) -> None:
    """Write a model into one GGUF file.

    Args:
        path: the file to write; it must not exist.
        folder: folder of the model, from which the tokenizer is read.
        config: settings of the model, including the defaults of settings that are missing from config.json.
        source: weights of the model.

    Raises:
        UsageError: the architecture, its rotary embedding or its activation function is not supported, or the columns of a layer are not a
            multiple of the columns of a block.
        InputError: the tokenizer is missing or is not supported.
    """
    architecture = _architecture(config)
    arch = gguf.MODEL_ARCH[architecture.name]
    for layer, (_, columns) in source.layers.items():
        blocks, width = block_kind(source.schemes.of(layer))
        if columns % width:
            raise UsageError(
                f"gguf: {blocks} has blocks of {width} columns, but {layer} has {columns}. Use another format."
            )
    names = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    rotated = _head_counts(config) if architecture.interleaved else {}

    def arranged(name: str, rows: Tensor) -> Tensor:
        heads = next((heads for leaf, heads in rotated.items() if re.search(rf"\.{leaf}\.(weight|bias)$", name)), None)
        return rows if heads is None else neighbors(rows, heads)

    order = sorted(name for name in source.tensors() if not name.endswith(_NOT_WEIGHTS))
    with closing(gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])) as writer:
        _add_settings(writer, config)
        writer.add_name(f"{folder.name} W{source.schemes.default.num_bits}A16")
        _add_tokenizer(writer, folder, int(config["vocab_size"]))
        for name in order:
            new = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if new is None:
                raise UsageError(f"gguf: {gguf.MODEL_ARCH_NAMES[arch]} has no tensor for {name}. Use another format.")
            shape, kind = _stored(name, source)
            writer.add_tensor_info(new, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in order:
            writer.write_tensor_data(arranged(name, _rows(name, source)).contiguous().view(torch.uint8).numpy())


def neighbors(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows so that the two rows of each rotary pair are neighbors.

    Args:
        rows: weight or bias of queries or keys, [heads D, ...] with head dimension D; rows i and i + D/2 of a head are a pair.
        heads: number of heads.
    """
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def _architecture(config: Mapping[str, Any]) -> GgufArchitecture:
    """Architecture of llama.cpp of a model.

    Raises:
        UsageError: the family, its rotary embedding or its activation function is not supported.
    """
    found = family_of(str(config.get("model_type"))).gguf
    if found is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.gguf is not None)
        raise UsageError(f"gguf: supports {known} only. Use another format.")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UsageError(
            f'gguf: rotary embeddings of the type "{shown(str(kind))}" are not supported. Use another format.'
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UsageError(
            f"gguf: the activation must be silu, not {shown(str(config['hidden_act']))}. Use another format."
        )
    return found


def _head_counts(config: Mapping[str, Any]) -> dict[str, int]:
    heads = int(config["num_attention_heads"])
    return {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}


def _stored(name: str, source: PackedCheckpoint) -> tuple[tuple[int, ...], gguf.GGMLQuantizationType]:
    """Stored shape of a tensor, whose last dimension counts bytes, and type of its blocks or values."""
    layer = name.removesuffix(".weight")
    if layer in source.layers:
        shape: tuple[int, ...] = source.layers[layer]
        kind = gguf.GGMLQuantizationType[block_kind(source.schemes.of(layer))[0]]
    else:
        shape = source.others[name].shape
        kind = _DTYPES[source.others[name].dtype] if len(shape) > 1 else gguf.GGMLQuantizationType.F32
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // block * size), kind


def _rows(name: str, source: PackedCheckpoint) -> Tensor:
    """A tensor as it is stored: the bytes of its blocks if it is quantized, otherwise its values."""
    layer = name.removesuffix(".weight")
    if layer in source.layers:
        return encode_blocks(source.packed(layer))
    value = source.read(name, device=CPU)
    return value if value.dim() > 1 else value.float()


def _add_settings(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = _head_counts(config)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads["q_proj"])
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    content = _byte_level_bpe(folder)
    words = {index: (text, gguf.TokenType.NORMAL) for text, index in content["model"]["vocab"].items()}
    for token in content.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
        words[int(token["id"])] = (token["content"], kind)
    if max(words) >= vocab_size:
        problem = f"has a token {max(words)}, but the model has {vocab_size} rows of embeddings. Resize the embeddings."
        raise InputError(folder / "tokenizer.json", problem)
    tokens = [words.get(index, (f"[PAD{index}]", gguf.TokenType.UNUSED)) for index in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitter(folder, content))
    writer.add_token_list([text.encode() for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    try:
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            folder, f"gguf cannot read the special tokens: {shown(str(error))}. Correct the tokenizer files."
        ) from error
    special.add_to_gguf(writer, quiet=True)


def _byte_level_bpe(folder: Path) -> dict[str, Any]:
    """Content of tokenizer.json, which must be a byte-level BPE.

    Raises:
        InputError: the file is missing, cannot be read, or describes another kind of tokenizer.
    """
    path = folder / "tokenizer.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model, decoder = content["model"], content.get("decoder") or {}
        known = model["type"] == "BPE" and not model.get("byte_fallback") and decoder.get("type") == "ByteLevel"
    except FileNotFoundError as error:
        raise InputError(path, "missing. Add it, or use another format.") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(path, f"cannot be read: {shown(str(error))}. Copy it again.") from error
    if not known:
        raise InputError(path, "not a byte-level BPE, the only supported kind. Use another format.")
    return content


def _splitter(folder: Path, content: Mapping[str, Any]) -> str:
    """Name in llama.cpp of the pre-tokenizer, which splits text before BPE.

    Raises:
        InputError: the pre-tokenizer or the normalizer is not supported.
    """
    steps = list(_steps(content.get("pre_tokenizer") or {}))
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    plain = not last.get("add_prefix_space") and _normalizes_nothing_but_nfc(content.get("normalizer"))
    if plain and kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        for name, known in _PATTERNS.items():
            if isolated and pattern == known:
                return name
    raise InputError(
        folder / "tokenizer.json",
        "its pre-tokenizer or normalizer is not supported: llama.cpp would split text differently. Use another format.",
    )


def _normalizes_nothing_but_nfc(normalizer: Any) -> bool:
    """Whether a normalizer changes no text that is in NFC already, as almost all text is; llama.cpp normalizes nothing."""
    return normalizer is None or normalizer == {"type": "NFC"}


def _steps(pre_tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
