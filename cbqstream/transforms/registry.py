"""The transforms, in the order in which they are applied to a block."""

from cbqstream.config import TransformConfig
from cbqstream.scheme import Scheme
from cbqstream.transforms.smoothing import Smoothing
from cbqstream.transforms.transform import Transform
from cbqstream.transforms.truncation import Truncation

TRANSFORMS: tuple[type[Transform], ...] = (Smoothing, Truncation)


def active(config: TransformConfig, scheme: Scheme) -> tuple[type[Transform], ...]:
    """The transforms that the settings ask for under a scheme."""
    return tuple(transform for transform in TRANSFORMS if transform.is_active(config, scheme))
