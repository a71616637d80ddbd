"""The layouts in which quantized linear layers are stored, and which layer of a checkpoint has which.

A new layout is a class in a file of its own, and a row of `LAYOUTS`.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.packed.int_quantized import IntQuantized
from cbqstream.packed.layout import Layout
from cbqstream.packed.pack_quantized import PackQuantized
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import LayerSchemes, Scheme

LAYOUTS: Mapping[str, Layout] = MappingProxyType({row.format: row for row in (IntQuantized(), PackQuantized())})
"""Layouts by the name of their format. New weights are stored in the first one that is for their scheme."""

_FIRST = PackQuantized.format
"""The only format of older versions."""


def layout_of(scheme: Scheme) -> Layout:
    """The layout in which new weights with a scheme are stored."""
    return next(layout for layout in LAYOUTS.values() if layout.is_for(scheme))


def newer_formats(schemes: LayerSchemes) -> list[str]:
    """Formats of new weights with these schemes in which older versions, with the same settings, did not store them."""
    return sorted({layout_of(scheme).format for scheme in schemes.all} - {_FIRST})


def encode(weight: QuantizedWeight, *, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Encode a new weight in the layout for its scheme, see `Layout.encode`."""
    return layout_of(weight.scheme).encode(weight, scale_dtype)


def layouts_in(infos: Mapping[str, TensorInfo], schemes: LayerSchemes) -> dict[str, Layout]:
    """Layout of each quantized layer of a checkpoint, complete or not, by the path of the layer.

    The tensors alone decide, because the shards of a run directory have no quantization_config.

    Args:
        infos: location, shape and dtype of every tensor of the checkpoint, by name.
        schemes: schemes of the layers. Layers in full precision are left out.
    """
    found = {}
    for name in infos:
        layer, _, part = name.rpartition(".")
        for layout in LAYOUTS.values():
            if part == layout.codes and layout.is_in(infos, layer) and not schemes.is_ignored(layer):
                found[layer] = layout
    return found
