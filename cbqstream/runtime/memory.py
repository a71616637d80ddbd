"""Memory of this process: how much it uses, and returning it to the system."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

GIB = 1 << 30
_M_MMAP_THRESHOLD = -3  # of malloc.h
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_MEMORY_FILES = (
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("", "0", "memory.max", "memory.current", "inactive_file"),
    ("unified", "0", "memory.max", "memory.current", "inactive_file"),
)
"""Folder of control groups (version 1, version 2, and version 2 beside version 1), the number or controller of their lines in
/proc/self/cgroup, and their names of the limit, the usage, and the files in the page cache, in bytes."""
_TOO_LITTLE = ("out of memory", "_ALLOC_FAILED")


def resident_bytes() -> int:
    """Resident set size of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Memory that this process and the page cache can still take, in bytes: what the machine has, and what its control groups allow."""
    machine = int(psutil.virtual_memory().available)
    return max(0, min([machine, *_left_in_control_groups(_CONTROL_GROUPS, Path("/proc/self/cgroup"))]))


def _left_in_control_groups(mounted: Path, listed: Path) -> Iterator[int]:
    """Memory in bytes that each control group of this process with a limit has left, versions 1 and 2. Cached files count as free.

    A group whose files cannot be read sets no limit.

    Args:
        mounted: folder in which the file systems of control groups are mounted.
        listed: file that lists the groups of this process, as `number:controllers:path`.
    """
    try:
        groups = [line.split(":", 2) for line in listed.read_text().splitlines()]
    except OSError:
        return
    for root, kind, limit, usage, cached in _MEMORY_FILES:
        top = mounted / root
        for number, controllers, path in groups:
            if kind not in (number, *controllers.split(",")):
                continue
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):  # inside a container, only the top may exist
                with suppress(OSError, KeyError, ValueError):  # no such file, no such value, or "max"
                    if folder.is_relative_to(top):
                        statistics = (folder / "memory.stat").read_text().split()
                        held = dict(zip(statistics[::2], statistics[1::2], strict=True))
                        allowed, used = (int((folder / name).read_text()) for name in (limit, usage))
                        yield allowed - used + int(held[cached])


def peak_resident_bytes() -> int:
    """Highest resident set size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the memory of the parent process
        return int(status.read_text(encoding="ascii", errors="replace").partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_large_blocks(*, offloading: bool = False) -> None:
    """Have the heap return every allocation of 16 MiB or more to the system as soon as it is freed; with offloading, of 1 MiB or more.

    glibc raises its own limit to 32 MiB when such blocks come and go, and then keeps them. Varying batch sizes of experts then fragment the
    heap until it is twice as large as its content. The limit of 1 MiB takes a tenth more time.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, (1 if offloading else 16) << 20)


def release_free_memory() -> None:
    """Return unused memory to the system: first what only reference cycles keep alive, then what was freed.

    glibc keeps the holes between live allocations, and they add up over windows.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed memory to the system, including holes between live allocations. Takes milliseconds.

    An allocation that torch aligned leaves a hole that the next one of the same size does not fit in (glibc bug 14581, before 2.38).
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_device_memory(error: BaseException) -> bool:
    """Whether an error says that a device has too little memory. Errors of CUDA, its libraries and Triton are plain RuntimeErrors."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and any(text in str(error) for text in _TOO_LITTLE))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory; the one of torch on the CPU is a plain RuntimeError."""
    return isinstance(error, MemoryError) or is_out_of_device_memory(error) or "can't allocate memory" in str(error)


def physical_cores() -> int:
    """Physical CPU cores that this process may run on, at least 1."""
    allowed = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else psutil.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed))
