"""The interface of a transform: a change of a block that makes it easier to quantize.

A transform is found when a block enters its first window, from the block's weights and the statistics of its inputs. It is applied to the
weights in memory, and to the stored tensors of the block that no quantized layer holds (its norms). What was found is kept in the window
state, so the next window applies the same transform again. A transform of weights alone changes the weight that is rounded.

A new transform is a subclass in a file of its own and a row in `registry.py`; its settings are fields of `TransformConfig`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cbqstream.config import TransformConfig
from cbqstream.models.families import SmoothingPair
from cbqstream.numerics.input_statistics import InputStatistics
from cbqstream.scheme import Scheme


@dataclass(frozen=True, slots=True)
class BlockParts:
    """The parts of a block that a transform may look at and change."""

    module: nn.Module
    """The block, whose quantized layers have a tensor `weight` and may have a `bias`."""
    schemes: Mapping[str, Scheme]
    """Scheme of each quantized layer, by its name in the block."""
    pairs: tuple[SmoothingPair, ...]
    """Places where channels can be rescaled."""
    place: Callable[[Collection[str]], AbstractContextManager[None]]
    """Keeps the weights of named quantized layers in memory inside a `with`; names of other modules are ignored."""


@dataclass(frozen=True, slots=True)
class TransformCost:
    """Memory of a transform."""

    copies: int = 0
    """Copies of each weight that are kept beside it while the window is optimized."""
    search_bytes: int = 0
    """Bytes per weight of the layers that are looked at together while the transform is found."""


class Transform(ABC):
    """A change of a block, found once and applied in every window of the block. The defaults change nothing."""

    name: ClassVar[str]
    """Prefix of what was found in the window state."""

    def __init__(self, config: TransformConfig) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def is_active(cls, config: TransformConfig, scheme: Scheme) -> bool:
        """Whether the settings ask for the transform under a scheme."""

    @classmethod
    def cost(cls) -> TransformCost:
        """Memory that the transform takes."""
        return TransformCost()

    def sampled_layers(self, block: BlockParts) -> Set[str]:
        """Layers of whose inputs `find` needs a sample."""
        return frozenset()

    def find(self, block: BlockParts, statistics: dict[str, InputStatistics]) -> dict[str, Tensor]:
        """Find the transform of a block and apply it.

        Args:
            block: with its original weights, as earlier transforms left them.
            statistics: of the inputs of every quantized layer; replaced by those of the transformed inputs.

        Returns:
            What `apply` and `stored` need, by name.
        """
        return {}

    def apply(self, block: BlockParts, found: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Apply again what `find` found in an earlier window, to the original weights."""

    def stored(self, block: BlockParts, found: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Changes of stored tensors that no quantized layer holds, by their name in the block."""
        return {}

    def weight_to_round(self, w_OI: Tensor) -> Tensor:
        """The weight whose rounding is learned in place of the layer's weight; the argument itself if it is the same."""
        return w_OI
