"""Sizes of the parts of a model, computed from the headers of its shards and config.json."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbqstream.checkpoint.folder import find_tensors, is_size, quant_method_of, read_json
from cbqstream.checkpoint.header import described
from cbqstream.errors import InputError
from cbqstream.hub import fetch_headers
from cbqstream.models.families import EXPERT, family_of
from cbqstream.records import TensorInfo


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model. Sizes of a block are those of the largest block."""

    num_blocks: int
    """Number of blocks."""
    hidden: int
    """Width of the hidden states."""
    vocabulary: int
    """Number of token ids."""
    layers: Mapping[str, tuple[int, int]]
    """[O, I] of each linear layer of a block, by the name of its weight in the checkpoint."""
    experts: float
    """Share of the experts of a block that compute a token; 1 without experts."""
    stored: int
    """Size of a stored weight in bytes."""
    block_bytes: int
    """Size of a block in bytes."""
    source_bytes: int
    """Size of all tensors in bytes."""
    outer_bytes: int
    """Size of the tensors outside the blocks in bytes."""
    eager_heads: int = 0
    """Number of attention heads in families that have only eager attention, which stores a matrix [S, S] for each head; otherwise 0."""

    @property
    def weights(self) -> int:
        """Number of weights in the linear layers of a block."""
        return sum(rows * columns for rows, columns in self.layers.values())

    @property
    def largest(self) -> int:
        """Number of weights in the largest layer."""
        return math.prod(self.largest_layer)

    @property
    def largest_layer(self) -> tuple[int, int]:
        """[O, I] of the largest layer."""
        return max(self.layers.values(), key=math.prod)

    @property
    def outputs(self) -> int:
        """Number of output values of all layers of a block for each token."""
        return int(sum(self._share(name) * rows for name, (rows, _) in self.layers.items()))

    @property
    def active(self) -> int:
        """Number of weights in the layers of a block that compute a token."""
        return int(sum(self._share(name) * rows * columns for name, (rows, columns) in self.layers.items()))

    def _share(self, name: str) -> float:
        return self.experts if EXPERT.search(name) else 1

    @classmethod
    def of(cls, folder: Path) -> "ModelSizes":
        """Sizes of the model in a folder.

        Raises:
            InputError: the model cannot be read, or has no blocks.
        """
        return cls.counted(folder, read_json(folder, "config.json"), find_tensors(folder))

    @classmethod
    def of_name(cls, name: str, revision: str | None) -> "ModelSizes":
        """Sizes of a model on the Hub; only its headers and config.json are fetched.

        Args:
            name: name of the model, `owner/name`.
            revision: branch, tag or commit; None is the default branch.

        Raises:
            InputError: the model cannot be fetched, or has no blocks.
        """
        folder, headers = fetch_headers(name, revision)
        infos = {key: info for file, held in headers.items() for key, info in described(Path(name, file), held).items()}
        return cls.counted(Path(name), read_json(folder, "config.json"), infos)

    @classmethod
    def counted(cls, folder: Path, model: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> "ModelSizes":
        """Sizes of a model whose config.json and headers were read.

        Args:
            folder: folder of the model, for messages.
            model: content of config.json.
            infos: location, shape and dtype of every tensor, by name.

        Raises:
            InputError: the model is quantized, or has no blocks.
        """
        require_original(folder, model)
        blocks, text = _by_block(infos), model.get("text_config")
        model = {**model, **(text if isinstance(text, dict) else {})}
        largest = max(blocks.values(), key=lambda tensors: sum(info.num_bytes for info in tensors), default=[])
        matrices = [info for info in largest if len(info.shape) == 2]
        if not matrices:
            raise InputError(folder, "no matrices of numbered blocks. Give the folder of a language model.")
        for info in (info for tensors in blocks.values() for info in tensors):
            if len(info.shape) == 2 and not all(is_size(size) for size in info.shape):
                raise InputError(info.file, f"shape {list(info.shape)} is not plausible.", tensor=info.name)
        in_blocks = {info.name for tensors in blocks.values() for info in tensors}
        outside = [info for name, info in infos.items() if name not in in_blocks]
        vocabulary = max((info.shape[0] for info in outside if len(info.shape) == 2), default=0)
        return cls(
            len(blocks),
            next((model[name] for name in ("hidden_size", "n_embd") if is_size(model.get(name))), 0),
            model["vocab_size"] if is_size(model.get("vocab_size")) else vocabulary,
            {info.name: (info.shape[0], info.shape[1]) for info in matrices},
            _share_of_experts(model, [info.name for info in matrices]),
            max(info.dtype.itemsize for info in matrices),
            sum(info.num_bytes for info in largest),
            sum(info.num_bytes for info in infos.values()),
            sum(info.num_bytes for info in outside),
            _eager_heads(model),
        )


def require_original(folder: Path, model: Mapping[str, Any]) -> None:
    """Check that a model is not quantized already.

    Args:
        folder: folder of the model, for the message.
        model: content of config.json.

    Raises:
        InputError: config.json has a quantization_config.
    """
    config = model.get("quantization_config")
    if config:
        problem = f"the model is already quantized ({quant_method_of(config)})"
        raise InputError(
            folder / "config.json", f"{problem}. Give the original model; if that is in FP8, convert it to bf16."
        )


def _share_of_experts(model: Mapping[str, Any], names: Sequence[str]) -> float:
    """Share of the experts of a block that compute a token, from config.json and the names of the layers; 1 without experts."""
    number = len({match[1] for name in names if (match := EXPERT.search(name))})
    chosen = next((model[key] for key in ("num_experts_per_tok", "moe_k", "moe_topk") if model.get(key)), number)
    return min(1.0, chosen / number) if number else 1.0


def _eager_heads(model: Mapping[str, Any]) -> int:
    """Number of attention heads in a family that has only eager attention; otherwise 0."""
    heads = next((model[name] for name in ("num_attention_heads", "n_head") if is_size(model.get(name))), 0)
    return heads if family_of(str(model.get("model_type"))).eager_attention else 0


def _by_block(infos: Mapping[str, TensorInfo]) -> dict[int, list[TensorInfo]]:
    """Tensors of each block, by the number of the block.

    Tensors with a number in their name are grouped by the prefix before the first number. The group with the most bytes contains the
    blocks.
    """
    lists: dict[str, dict[int, list[TensorInfo]]] = {}
    for name, info in infos.items():
        match = re.match(r"(.*?\.)(\d+)\.", name)
        if match is not None:
            lists.setdefault(match[1], {}).setdefault(int(match[2]), []).append(info)
    return max(
        lists.values(),
        key=lambda blocks: sum(info.num_bytes for block in blocks.values() for info in block),
        default={},
    )
