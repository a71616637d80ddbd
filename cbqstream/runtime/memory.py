"""What this process uses of the machine's memory."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import psutil

GIB = 1 << 30
_M_MMAP_THRESHOLD = -3  # of malloc.h
_TOO_LITTLE = ("out of memory", "_ALLOC_FAILED")


def resident_bytes() -> int:
    """Resident set size of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Highest resident set size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        return int(status.read_text(encoding="ascii", errors="replace").partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_large_blocks(*, memory_mode: bool = False) -> None:
    """Have every allocation of 16 MiB or more given back as soon as it is freed; with offloading, of 1 MiB, which takes a tenth more time.

    glibc raises that limit to 32 MiB by itself when such blocks come and go, and then keeps them in a heap full of holes: experts, who see
    now more and now fewer tokens, leave so many that the heap is twice as large as what is in it.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, (1 if memory_mode else 16) << 20)


def release_free_memory() -> None:
    """Give memory that is no longer used back to the system: first what only reference cycles hold, then what was freed.

    glibc keeps the holes between live allocations, and they add up over windows.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give what was freed back to the system, holes between live allocations too. Milliseconds.

    An allocation that torch aligned leaves a hole that the next one of its size does not fit in (glibc bug 14581, before 2.38).
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_device_memory(error: BaseException) -> bool:
    """Whether an error says that a device has too little memory: those of CUDA, its libraries and Triton are plain RuntimeErrors."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and any(text in str(error) for text in _TOO_LITTLE))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory: of torch's own, that on the CPU is a plain RuntimeError."""
    return isinstance(error, MemoryError) or is_out_of_device_memory(error) or "can't allocate memory" in str(error)


def physical_cores() -> int:
    """Physical CPU cores that this process may run on, at least 1."""
    allowed = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else psutil.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed))
