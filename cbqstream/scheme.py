"""Schemes: the format of quantized linear layers, and which layer has which. This module does not import torch."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cbqstream.errors import UsageError
from cbqstream.setting import require, require_choice, setting

ActivationStrategy = Literal["token", "tensor"]

_COMMON_GROUP_SIZES = (128, 64, 32, 16, 96, 48, 8)
"""Group sizes to suggest; the first four are what other formats and engines take too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """Format of the quantized linear layers: weights stored as `w = (q - zero_point) * scale`, and inputs quantized or not."""

    num_bits: int = setting(help="Width of a weight code in bits, 2 to 8", flag="")
    group_size: int | None = setting(128, help="Columns that share a scale; -1 is one scale per channel (row)")
    symmetric: bool = setting(
        True, help="No zero points; transformers loads asymmetric weights only when asked to dequantize"
    )
    activation_bits: int | None = setting(None, help="Width of the inputs of quantized layers in bits", flag="")
    activation_strategy: ActivationStrategy = setting(
        "token",
        help="Scales of quantized inputs (A8, A4): token (dynamic, per token) or tensor (one learned per layer)",
    )

    _PATTERN: ClassVar[re.Pattern[str]] = re.compile(r"W([2-8])A(4|8|16)")

    def __post_init__(self) -> None:
        require(2 <= self.num_bits <= 8, f"num_bits is {self.num_bits}. It must be 2 to 8.")
        require_choice(self, "activation_strategy", ActivationStrategy)
        require(
            self.activation_bits in (None, 4, 8),
            f"activation_bits is {self.activation_bits}. It must be 4, 8 or None.",
        )
        require(
            self.group_size is None or (self.group_size >= 8 and self.group_size % 8 == 0),
            f"group_size is {self.group_size}. It must be a multiple of 8, or -1 for one scale per channel.",
        )

    @classmethod
    def named(cls, name: str, **options: Any) -> "Scheme":
        """The scheme with a name such as W4A16; other fields as given.

        Raises:
            UsageError: the name is not that of a supported scheme.
        """
        match = cls._PATTERN.fullmatch(name.upper())
        if match is None:
            raise UsageError(f"scheme {name!r} is not supported. Use W2 to W8 with A16, A8 or A4, such as W4A16.")
        activation_bits = None if match[2] == "16" else int(match[2])
        return cls(num_bits=int(match[1]), activation_bits=activation_bits, **options)

    def require_whole_groups(self, layer: str, columns: int) -> None:
        """Refuse a layer whose columns do not fill whole groups.

        Raises:
            UsageError: the group size does not divide the columns.
        """
        size = self.group_size
        if size is not None and columns % size:
            fitting = [other for other in _COMMON_GROUP_SIZES if columns % other == 0 and other < size]
            own = layer.removesuffix(".weight").rpartition(".")[2]
            remedy = f"{fitting[0]} fits; or use" if fitting else f"Leave the layer out with --ignore {own}, or use"
            raise UsageError(
                f"group size {size} does not divide the {columns} columns of {layer}. {remedy} -1 (per channel)."
            )

    @property
    def name(self) -> str:
        """Name of the scheme, as `named` takes it."""
        return f"W{self.num_bits}A{self.activation_bits or 16}"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.num_bits - 1)) - 1


@dataclass(frozen=True, slots=True)
class LayerSchemes:
    """The scheme of each layer of a model."""

    default: Scheme
    others: tuple[tuple[str, Scheme], ...] = ()
    """Regular expressions of whole module paths, and the scheme of the layers that they match."""
    ignored: frozenset[str] = frozenset()
    """Module paths of layers that stay in full precision."""
    ignored_patterns: tuple[str, ...] = ()
    """Regular expressions for the start of the module paths of further such layers."""

    @property
    def all(self) -> tuple[Scheme, ...]:
        """The default scheme and the others."""
        return (self.default, *(scheme for _, scheme in self.others))

    def is_ignored(self, path: str) -> bool:
        """Whether the layer with a module path stays in full precision."""
        return path in self.ignored or any(re.match(pattern, path) for pattern in self.ignored_patterns)

    def of(self, path: str) -> Scheme:
        """The scheme of the layer with a module path.

        Raises:
            UsageError: two expressions with different schemes match the path.
        """
        found = {scheme for pattern, scheme in self.others if re.fullmatch(pattern, path)}
        if len(found) > 1:
            raise UsageError(f"{path}: two overrides match it. Make them more exact.")
        return found.pop() if found else self.default


def path_pattern(pattern: str) -> str:
    """Regular expression of the module paths that contain `pattern` as whole parts; in it * is any text and ? any character."""
    body = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return rf"(?:.*\.)?{body}(?:\..*)?"
