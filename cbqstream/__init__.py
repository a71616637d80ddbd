"""cbqstream: Cross-Block Quantization of language models that are far larger than memory.

The names in `__all__` are the public interface. Everything else may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cbqstream.config import CalibrationConfig, QuantizeConfig, ReconstructionConfig, TransformConfig, WindowConfig
from cbqstream.errors import CbqstreamError
from cbqstream.profiles import PROFILES
from cbqstream.scheme import Scheme

if TYPE_CHECKING:
    from cbqstream.evaluation.perplexity import evaluate
    from cbqstream.planning.plan import plan
    from cbqstream.run.pipeline import quantize

__version__ = "0.1.0"

__all__ = [
    "PROFILES",
    "CalibrationConfig",
    "CbqstreamError",
    "QuantizeConfig",
    "ReconstructionConfig",
    "Scheme",
    "TransformConfig",
    "WindowConfig",
    "__version__",
    "evaluate",
    "plan",
    "quantize",
]

_NEED_TORCH = {
    "evaluate": "cbqstream.evaluation.perplexity",
    "plan": "cbqstream.planning.plan",
    "quantize": "cbqstream.run.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import functions that need torch at their first use, so that importing settings and errors takes milliseconds."""
    if name in _NEED_TORCH:
        return getattr(import_module(_NEED_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
