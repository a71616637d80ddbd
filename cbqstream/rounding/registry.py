"""The rounding methods, by the name that `ReconstructionConfig.rounding` has for each."""

from collections.abc import Mapping
from types import MappingProxyType

from cbqstream.config import ReconstructionConfig
from cbqstream.rounding.gptq import Gptq
from cbqstream.rounding.lora_rounding import LoraRounding
from cbqstream.rounding.nearest import Nearest
from cbqstream.rounding.rounding import Rounding
from cbqstream.rounding.signround import SignRound

METHODS: Mapping[str, type[Rounding]] = MappingProxyType(
    {method.name: method for method in (SignRound, LoraRounding, Gptq, Nearest)}
)


def method_of(config: ReconstructionConfig) -> type[Rounding]:
    """The rounding method that the settings select."""
    return METHODS[config.rounding]
