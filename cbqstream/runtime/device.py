"""Device and numerics: the one module that sets the global state of torch on which numerical results depend, and describes it."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from cbqstream.errors import UsageError
from cbqstream.records import Numerics
from cbqstream.runtime.memory import physical_cores
from cbqstream.setting import require_device

_OVERRIDES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_Setting = tuple[Callable[[], Any], Callable[[Any], object], Any]
"""Getter, setter and value of a part of the global state."""


def choose_device(name: str) -> torch.device:
    """The device of a setting: `auto` is the first CUDA device, or the CPU if there is none.

    Raises:
        UsageError: the name is not that of a device, or the CUDA device does not exist.
    """
    require_device(name)
    available = torch.cuda.is_available()
    device = torch.device(("cuda:0" if available else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        if not available or (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device {name} is not available. Use --device cpu.")
        device = torch.device("cuda", device.index or 0)
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak_device_bytes(device: torch.device) -> int:
    """Highest memory of tensors on a CUDA device since the last call, bytes; 0 on the CPU."""
    if device.type == "cpu":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


@contextmanager
def fixed_numerics(device: torch.device, threads: int | None = None) -> Iterator[int]:
    """Make results reproducible inside a `with`: fix the number of threads, and disable nondeterministic algorithms and TF32.

    A CUDA device becomes the current one, on which Triton launches. The global state of torch is restored at the end.

    Args:
        device: device on which is computed.
        threads: CPU threads; the physical cores by default.

    Yields:
        The number of threads.

    Raises:
        UsageError: the environment enables TF32 in spite of the settings of torch.
    """
    for variable in _OVERRIDES:
        if variable in os.environ:
            raise UsageError(f"{variable} is set, which changes the precision of matrix products. Unset it.")
    matmul, deterministic = torch.backends.cuda.matmul, torch.utils.deterministic
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    precisions = (torch.backends, matmul, mkldnn, mkldnn.matmul, cudnn, cudnn.conv, cudnn.rnn)
    count = threads or physical_cores()
    settings: list[_Setting] = [
        (torch.get_num_threads, torch.set_num_threads, count),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 2),
        # filling new tensors takes 8 % of a step; a test shows that what is filled is never read
        _attribute(deterministic, "fill_uninitialized_memory", value=False),
        # before the older settings of precision, which change these too, so that these are restored after them
        *(_attribute(owner, "fp32_precision", value="ieee") for owner in precisions),
        _older((torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")),
        _older(_attribute(matmul, "allow_tf32", value=False)),
        _attribute(matmul, "allow_bf16_reduced_precision_reduction", value=False),
        _attribute(matmul, "allow_fp16_reduced_precision_reduction", value=False),
        # the backward pass of cuDNN's attention is not deterministic
        (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False),
        _older(_attribute(cudnn, "allow_tf32", value=False)),
        _attribute(cudnn, "deterministic", value=True),
        _attribute(cudnn, "benchmark", value=False),
        (lambda: os.environ.get(_WORKSPACE), _set_workspace, ":4096:8"),  # read by cuBLAS when it starts
    ]
    if device.type == "cuda":
        settings.append((torch.cuda.current_device, torch.cuda.set_device, device.index or 0))
    before = [get() for get, _, _ in settings]
    try:
        for _, put, value in settings:
            put(value)
        yield count
    finally:
        for (_, put, _), value in zip(reversed(settings), reversed(before), strict=True):
            put(value)


def _attribute(owner: Any, name: str, *, value: Any) -> _Setting:
    return lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value


def _older(setting: _Setting) -> _Setting:
    """A setting that torch cannot read if it contradicts the `fp32_precision` of the program. It is not restored then."""
    get, put, value = setting

    def read() -> Any:
        with suppress(RuntimeError):
            return get()

    def write(new: Any) -> None:
        if new is not None:
            put(new)

    return read, write, value


def _set_workspace(value: str | None) -> None:
    if value is None:
        os.environ.pop(_WORKSPACE, None)
    else:
        os.environ[_WORKSPACE] = value


def numerics_of(device: torch.device, threads: int) -> Numerics:
    """The numerics of this machine, its libraries and a number of threads."""
    known: dict[str, Any] = {
        "device": device.type,
        "device_name": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    if device.type == "cuda":
        known["device_name"] = torch.cuda.get_device_name(device)
        known["cuda"], known["triton"] = torch.version.cuda, installed_version("triton")
        known["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return Numerics(**known)


def installed_version(package: str) -> str | None:
    """Version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
