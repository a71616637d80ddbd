"""Truncation of the outliers of every weight to its largest reserved magnitude (CFP, arXiv 2312.07950, sec. 3.2)."""

from torch import Tensor
from typing_extensions import override

from cbqstream.config import TransformConfig
from cbqstream.numerics.outliers import OutlierRule, truncated
from cbqstream.scheme import Scheme
from cbqstream.transforms.transform import Transform, TransformCost


class Truncation(Transform):
    """The rounded weight is the truncated one. It is a function of the weight, so nothing is kept between windows."""

    name = "truncation"

    @classmethod
    @override
    def is_active(cls, config: TransformConfig, scheme: Scheme) -> bool:
        return config.truncate_weights

    @classmethod
    @override
    def cost(cls) -> TransformCost:
        return TransformCost(copies=1)

    @override
    def weight_to_round(self, w_OI: Tensor) -> Tensor:
        return truncated(w_OI, OutlierRule.of(self.config))
