"""The dense tensors of a model folder, whoever wrote it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbqstream.checkpoint.decoding import decoded_tensors, quantizes_inputs
from cbqstream.checkpoint.folder import find_tensors, quantization_of
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import OpenedSource
from cbqstream.packed.format import schemes_if_own
from cbqstream.packed.packed_checkpoint import PackedCheckpoint


def open_source(folder: Path, config: Mapping[str, Any], *, allow_links: bool = False) -> OpenedSource:
    """The dense tensors of a model folder, decoded one at a time if it is quantized.

    A model in the form that `quantize` writes also quantizes the inputs of its layers, if its schemes say so. Of other quantized models,
    only the weights are decoded (`decoders/`).

    Args:
        folder: folder of the model.
        config: content of its config.json.
        allow_links: read shards that are links to files outside the folder.

    Raises:
        InputError: the checkpoint cannot be read, or is quantized in a way that is not read.
    """
    stored = find_tensors(folder, allow_links=allow_links)
    schemes = schemes_if_own(quantization_of(folder, config))
    if schemes is not None:
        return PackedCheckpoint(Checkpoint(stored), schemes)
    return Checkpoint(decoded_tensors(folder, config, stored), stored)


def has_unread_input_quantizers(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether inference engines quantize the inputs of the layers of a model, but `open_source` gives its weights only.

    Args:
        folder: folder of the model.
        config: content of its config.json.
    """
    quantization = quantization_of(folder, config)
    return quantization is not None and schemes_if_own(quantization) is None and quantizes_inputs(quantization)
