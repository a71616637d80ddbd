"""Construction of modules without memory for their weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode

_LARGE = 1 << 20
"""Number of values from which an uninitialized tensor is not allocated."""


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Make `torch.empty` return large tensors on the meta device.

    `init_empty_weights` moves a parameter to the meta device after it was allocated. The fused experts of a block of DeepSeek-V3 are 45 GB
    in float32, which many machines cannot allocate even for a moment.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.empty and named.get("device") is None:
            size = args[0] if args and isinstance(args[0], Sequence) else named.get("size", args)
            if math.prod(size) >= _LARGE:
                named["device"] = "meta"
        return func(*args, **named)


@contextmanager
def empty_weights() -> Iterator[None]:
    """Put the parameters of all modules that are made inside a `with` on the meta device. Buffers keep their values."""
    with init_empty_weights(include_buffers=False), _LargeTensorsOnMeta():
        yield
