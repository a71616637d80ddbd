"""Sizes of the parts of a model, computed from its modules and the headers of its shards."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from cbqstream.checkpoint.tensors import DerivedTensor, computed_bytes, stored_bytes
from cbqstream.config import QuantizeConfig
from cbqstream.models.families import EXPERT
from cbqstream.models.meta_model import MetaModel
from cbqstream.windows.read_block import can_be_alone


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model. Sizes of a block are those of the block with the most bytes."""

    num_blocks: int
    """Number of blocks."""
    hidden: int
    """Width of the embedding, and of one hidden state of a token."""
    vocabulary: int
    """Number of token ids."""
    layers: Mapping[str, tuple[int, int]]
    """[O, I] of each linear layer of a block, by the name of its weight in the checkpoint."""
    experts: float
    """Share of the experts of a block that compute a token; 1 without experts."""
    stored: int
    """Size of a weight in bytes, as it is read."""
    block_bytes: int
    """Size of a block in bytes, as it is read."""
    block_read: int
    """Size of the same block in the files."""
    source_bytes: int
    """Size of all tensors in the files."""
    outer_bytes: int
    """Size of all tensors outside the blocks in bytes, as they are read."""
    outer_read: int
    """Size of all tensors outside the blocks in the files."""
    ends_bytes: int
    """Size of the embedding, the final norm and the head in bytes."""
    decoded: int = 0
    """Largest size in the files of a weight that is decoded as it is read; 0 if there is none."""
    eager_heads: int = 0
    """Number of attention heads in families that have only eager attention, which stores a matrix [S, S] for each head; otherwise 0."""
    parallel: int = 1
    """Number of parallel hidden states of a token."""
    beside: int = 0
    """Size of the arguments of all blocks that depend on the tokens, in bytes per token."""
    handed: Callable[[int], int] = lambda tokens: 0
    """Gives the size of the values that a block hands on besides hidden states, from the number of tokens of a segment."""
    dense: "ModelSizes | None" = None
    """Sizes of the model without the layers of routed experts; None if it has none."""
    routed: "ModelSizes | None" = None
    """Sizes of the layers of routed experts alone, of the blocks that have some; None if there are none that can be trained alone."""

    @property
    def states(self) -> int:
        """Width of all hidden states of a token together."""
        return self.hidden * self.parallel

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
        return max(self.layers.values(), key=math.prod, default=(0, 0))

    @property
    def outputs(self) -> int:
        """Number of output values of all layers of a block for each token."""
        return int(sum(self._share(name) * rows for name, (rows, _) in self.layers.items()))

    @property
    def active(self) -> int:
        """Number of weights in the layers of a block that compute a token."""
        return int(sum(self._share(name) * rows * columns for name, (rows, columns) in self.layers.items()))

    @property
    def num_experts(self) -> int:
        """Number of routed experts in a block; 0 if there are none."""
        return len({match[1] for name in self.layers if (match := EXPERT.search(name))})

    def _share(self, name: str) -> float:
        return self.experts if EXPERT.search(name) else 1

    def in_windows(self, config: QuantizeConfig) -> "ModelSizes":
        """Sizes of what the windows of a run hold: without routed experts if these are trained alone."""
        return self if self.experts_alone(config) is None else self.dense or self

    def experts_alone(self, config: QuantizeConfig) -> "ModelSizes | None":
        """Sizes of the routed experts that are trained alone; None if there are none, or if they are trained in windows."""
        return self.routed if config.reconstruction.experts == "alone" else None

    @classmethod
    def of(cls, meta_model: MetaModel) -> Self:
        """Sizes of a model."""
        whole = cls._of(meta_model, lambda name: True)
        mixture = any(EXPERT.search(name) for spec in meta_model.blocks for name in spec.linears)
        if not (mixture and can_be_alone(meta_model)):
            return whole
        dense, routed = (
            replace(part, outer_bytes=whole.outer_bytes, outer_read=whole.outer_read)
            for part in (
                cls._of(meta_model, lambda name: not EXPERT.search(name)),
                cls._of(meta_model, lambda name: bool(EXPERT.search(name))),
            )
        )
        return replace(whole, dense=dense, routed=routed)

    @classmethod
    def _of(cls, meta_model: MetaModel, counts: Callable[[str], bool]) -> Self:
        """Sizes of a model with some tensors of its blocks.

        Args:
            meta_model: the model.
            counts: whether a tensor or a layer of a block is one of them, from its name in the block.
        """
        infos = meta_model.infos
        held = [{key: infos[name] for key, name in spec.tensors.items() if counts(key)} for spec in meta_model.blocks]
        sizes, read = ([count(each.values()) for each in held if each] for count in (computed_bytes, stored_bytes))
        block_bytes = max(sizes)
        specs = [spec for spec, each in zip(meta_model.blocks, held, strict=True) if each]
        largest = specs[sizes.index(block_bytes)]
        stored = (largest.tensors[f"{layer}.weight"] for layer in largest.linears if counts(f"{layer}.weight"))
        layers = {name: infos[name] for name in stored}
        source_bytes = stored_bytes(infos.values())
        return cls(
            num_blocks=len(sizes),
            hidden=int(meta_model.text_config.hidden_size),
            parallel=max(1, meta_model.hidden_size // int(meta_model.text_config.hidden_size)),
            beside=meta_model.handover.token_bytes,
            handed=meta_model.handover.bytes_of_segment,
            vocabulary=meta_model.vocab_size,
            layers={name: (info.shape[0], info.shape[1]) for name, info in layers.items()},
            experts=_share_of_experts(meta_model.text_config, list(layers)),
            stored=max((info.dtype.itemsize for info in layers.values()), default=2),
            block_bytes=block_bytes,
            block_read=read[sizes.index(block_bytes)],
            source_bytes=source_bytes,
            outer_bytes=computed_bytes(infos.values()) - sum(sizes),
            outer_read=source_bytes - sum(read),
            decoded=max(
                (stored_bytes([info]) for info in infos.values() if isinstance(info, DerivedTensor)), default=0
            ),
            ends_bytes=computed_bytes(infos[name] for name in meta_model.outer.values()),
            eager_heads=int(meta_model.text_config.num_attention_heads) if meta_model.family.eager_attention else 0,
        )


def _share_of_experts(config: Any, names: Sequence[str]) -> float:
    """Share of the experts of a block that compute a token, from the configuration and the names of the layers; 1 without experts."""
    number = len({match[1] for name in names if (match := EXPERT.search(name))})
    known = (getattr(config, key, None) for key in ("num_experts_per_tok", "moe_k", "moe_topk"))
    chosen = next((count for count in known if isinstance(count, int) and count), number)
    return min(1.0, chosen / number) if number else 1.0
