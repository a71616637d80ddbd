"""Formats of checkpoints, by the `quant_method` of config.json, and the reader of each.

A new format is a reader with the members of `OpenedSource` in a file of its own, and a row here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cbqstream.checkpoint.folder import find_quantization, quant_method_of
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import OpenedSource
from cbqstream.packed.format import METHOD, not_supported, schemes_of
from cbqstream.packed.packed_checkpoint import PackedCheckpoint


def _packed(checkpoint: Checkpoint, quantization_config: dict[str, Any]) -> OpenedSource:
    return PackedCheckpoint(checkpoint, schemes_of(quantization_config))


SOURCES: Mapping[str, Callable[[Checkpoint, dict[str, Any]], OpenedSource]] = MappingProxyType({METHOD: _packed})
"""Functions that open a quantized checkpoint, by the `quant_method` of its quantization_config."""


def open_source(folder: Path, config: Mapping[str, Any], *, allow_links: bool = False) -> OpenedSource:
    """The dense tensors of a model folder, dequantized one at a time if it is quantized.

    Args:
        folder: folder of the model.
        config: content of its config.json.
        allow_links: read shards that are links to files outside the folder.

    Raises:
        InputError: the checkpoint cannot be read.
        UsageError: the checkpoint is quantized in a form that is not supported.
    """
    checkpoint, found = Checkpoint.open(folder, allow_links=allow_links), find_quantization(folder, config)
    if found is None:
        return checkpoint
    place, quantization_config = found
    opener = SOURCES.get(quant_method_of(quantization_config))
    if opener is None:
        raise not_supported(quantization_config, place)
    return opener(checkpoint, quantization_config)
