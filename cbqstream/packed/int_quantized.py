"""The layout of the format `int-quantized` of compressed-tensors, for W8A8 with one scale per channel.

    NAME.weight             int8 [O, I]                                  codes
    NAME.weight_zero_point  int8 [O, G]                                  if asymmetric

Scales are in `layout.py`. Inference engines load W8A8 in this format: their kernels multiply int8 codes and scale the product per channel.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.packed.layout import SCALE, ZERO_POINT, Layout, Part, groups_of, scales_of
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import Scheme


class IntQuantized(Layout):
    """Layout of `int-quantized`."""

    __slots__ = ()

    format = "int-quantized"
    codes = "weight"

    @override
    def is_for(self, scheme: Scheme) -> bool:
        return scheme.num_bits == 8 and scheme.activation_bits == 8 and scheme.group_size is None

    @override
    def can_hold(self, scheme: Scheme) -> bool:
        return scheme.num_bits == 8

    @override
    def warning(self, scheme: Scheme) -> str | None:
        if scheme.symmetric:
            return None
        return (
            "W8A8 with zero points is not loaded by vLLM 0.32 and SGLang 0.5, by their code. Leave out --no-symmetric."
        )

    @override
    def is_in(self, infos: Mapping[str, TensorInfo], layer: str) -> bool:
        weight = infos.get(f"{layer}.{self.codes}")
        if weight is None or f"{layer}.weight_packed" in infos:
            return False
        # either alone is a damaged layer, which must not be taken for a dense one
        return weight.torch_dtype == torch.int8 or f"{layer}.{SCALE}" in infos

    @override
    def weight_shape(self, checkpoint: Checkpoint, layer: str) -> tuple[int, int]:
        shape = checkpoint.infos[f"{layer}.{self.codes}"].shape
        if len(shape) != 2:
            raise ValueError(f"{self.codes} has {len(shape)} dimensions, not two")
        return shape[0], shape[1]

    @override
    def parts(self, scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
        groups = (rows, groups_of(scheme, columns))
        parts = {self.codes: Part((rows, columns), torch.int8), SCALE: Part(groups)}
        return parts if scheme.symmetric else {**parts, ZERO_POINT: Part(groups, torch.int8)}

    @override
    def encode(self, weight: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {self.codes: weight.codes.cpu(), **scales_of(weight, scale_dtype)}
        return tensors if weight.zero_point is None else {**tensors, ZERO_POINT: weight.zero_point.cpu()}

    @override
    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        zero_point = None if scheme.symmetric else tensors[ZERO_POINT]
        return QuantizedWeight(tensors[self.codes], tensors[SCALE].float(), zero_point, scheme)
