"""Choice of the kernels of a rounding method: Triton on CUDA, torch alone elsewhere."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch

from cbqstream.config import Kernels
from cbqstream.errors import UsageError, shown

Operations = TypeVar("Operations")


@dataclass(frozen=True, slots=True)
class KernelSet(Generic[Operations]):
    """The kernels of a rounding method. `Operations` is the protocol of its fused operations."""

    plain: Operations
    """The operations with torch alone, on any device."""
    triton: str
    """Name of the module that has the operations as Triton kernels."""
    launch_all: Callable[[Operations, torch.device], object]
    """Calls every operation once with small operands on a device."""

    def chosen(self, kernels: Kernels, device: torch.device) -> Operations:
        """The Triton kernels on CUDA; the plain ones on the CPU, and where `kernels` is "plain".

        Raises:
            UsageError: triton is not installed.
        """
        if kernels == "plain" or device.type == "cpu":
            return self.plain
        try:
            return cast("Operations", importlib.import_module(self.triton))
        except ImportError as error:
            raise UsageError(f"triton cannot be loaded ({error}). Install it, or use --kernels plain.") from error

    def require(self, kernels: Kernels, device: torch.device) -> None:
        """Launch the kernels of `chosen` once: Triton compiles at the first launch, which needs a C compiler.

        Raises:
            UsageError: they do not run.
        """
        operations = self.chosen(kernels, device)
        if operations is self.plain:
            return
        try:
            self.launch_all(operations, device)
        except Exception as error:  # a compiler may raise anything
            said = shown(str(error).partition("\n")[0])
            raise UsageError(
                f"the Triton kernels do not run ({said}). Install a C compiler and the Python headers, or use --kernels plain."
            ) from error
