"""Where and in which dtype models run: the one place that sets what numerical results depend on, and says what that is."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from cbqstream.errors import UsageError
from cbqstream.runtime.memory import physical_cores

_OVERRIDES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def choose_device(name: str) -> torch.device:
    """The device of a setting: `auto` is the first CUDA device, or the CPU where there is none. A CUDA device becomes the current one,
    on which Triton launches.

    Raises:
        UsageError: no such kind of device, or a CUDA device that is not there.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise UsageError(f"device {name!r} is not auto, cpu or cuda.")
    available = torch.cuda.is_available()
    device = torch.device(("cuda:0" if available else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        if not available or (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device {name} is not available. Use --device cpu.")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak_device_bytes(device: torch.device) -> int:
    """Highest memory that tensors had on a CUDA device since the last call, bytes; 0 on the CPU."""
    if device.type == "cpu":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def make_deterministic(threads: int | None) -> int:
    """Fix the thread count, and everything else that lets the same numbers come out otherwise; returns the threads.

    Raises:
        UsageError: the environment turns on again what is turned off here.
    """
    for variable in _OVERRIDES:
        if variable in os.environ:
            raise UsageError(f"{variable} is set, which changes results behind our back. Unset it.")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by cuBLAS when it starts
    count = threads or physical_cores()
    torch.set_num_threads(count)
    torch.use_deterministic_algorithms(mode=True)
    # filling it takes 8 % of a step; a test shows that it is never read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)  # its backward pass is not deterministic
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return count


def numerics_class(device: torch.device, threads: int) -> dict[str, Any]:
    """What must be equal for results to be equal bit for bit."""
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else platform.machine()
    cudnn = torch.backends.cudnn.version() if on_cuda else None  # type: ignore[no-untyped-call]
    libraries = {"cuda": torch.version.cuda, "cudnn": cudnn, "triton": installed_version("triton")} if on_cuda else {}
    return {
        "device": device.type,
        "device_name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **libraries,
    }


def installed_version(package: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
