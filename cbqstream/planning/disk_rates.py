"""Speed of the disks of a run, measured with files of bounded size in about two seconds."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cbqstream.disk import Disk, drop_cache
from cbqstream.errors import InputError
from cbqstream.runtime.memory import available_bytes

_PIECE = 16 << 20
_LARGEST = 256 << 20
"""Largest number of bytes that are written."""
_SECONDS = 0.6
"""Time after which a measurement ends with the piece that was begun."""
_SOURCE_PIECE = 4 << 20
_COPIED = 64 << 20
"""Bytes that are copied to a CUDA device."""


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Speed of disks in bytes per second."""

    folder: str
    """The folder in which reading and writing were measured."""
    read: float
    """Speed of sequential reads from the disk of the run directory."""
    write: float
    """Speed of sequential writes to that disk, which are synced every 16 MiB."""
    source: float
    """Speed of reads from the disk of the source; that of the run directory if the source is not on this machine."""
    cached: float
    """Speed of reads from the page cache."""
    bus: float | None
    """Speed of copies from memory to the CUDA device; None on the CPU."""
    memory: int
    """Memory that is available on the machine, in bytes."""


def measure_disks(run: Path, shards: Sequence[Path], device: torch.device) -> DiskRates:
    """Measure the disks of a run. A scratch file without a name is written, which is gone at the end.

    Args:
        run: the run directory; if it does not exist, the nearest folder above it that exists is used.
        shards: files of the source; none if it is not on this machine.
        device: device that computes.

    Raises:
        StorageError: nothing can be written there, or the page cache cannot be dropped.
        InputError: a shard cannot be read.
    """
    folder = next(path for path in (run.absolute(), *run.absolute().parents) if path.is_dir())
    with Disk().scratch(folder / f".cbqstream-plan-{os.getpid()}") as file:
        piece, offsets = bytearray(os.urandom(_PIECE)), list[int]()

        def write() -> int:
            offsets.append(file.append(piece))
            file.sync()
            return _PIECE

        def read(number: int) -> int:
            file.read(offsets[number % len(offsets)], piece)
            return _PIECE

        written = _speed(lambda number: write())
        cached = _speed(read, len(offsets))
        file.drop_cache()
        uncached = _speed(read, len(offsets))
    return DiskRates(
        folder=str(folder),
        read=uncached,
        write=written,
        source=_source_speed(max(shards, key=lambda path: path.stat().st_size)) if shards else uncached,
        cached=cached,
        bus=_bus_speed(device) if device.type == "cuda" else None,
        memory=available_bytes(),
    )


def _speed(move: Callable[[int], int], pieces: int = _LARGEST // _PIECE) -> float:
    """Speed of moving at most `pieces` pieces, in bytes per second. At least one piece is moved.

    Args:
        move: moves the piece with a number, and returns its size in bytes.
        pieces: largest number of pieces.
    """
    began, moved = time.perf_counter(), 0
    for number in range(pieces):
        moved += move(number)
        if time.perf_counter() - began > _SECONDS:
            break
    return moved / max(time.perf_counter() - began, 1e-9)


def _source_speed(shard: Path) -> float:
    """Speed of reading pieces of a shard that are spread over it, in bytes per second.

    Raises:
        InputError: the shard cannot be read, or the page cache cannot be dropped.
    """
    try:
        handle = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size, buffer = os.fstat(handle).st_size, bytearray(_SOURCE_PIECE)
            count = max(1, min(_LARGEST, size) // _SOURCE_PIECE)

            def read(number: int) -> int:
                start = number * (size // count)
                drop_cache(handle, start, _SOURCE_PIECE)
                return os.preadv(handle, [buffer], start)

            return _speed(read, count)
        finally:
            os.close(handle)
    except OSError as error:
        raise InputError(shard, f"cannot be read: {error.strerror}. Check the file.") from error


def _bus_speed(device: torch.device) -> float:
    """Speed of copying pageable memory, as offloaded layers are copied, in bytes per second."""
    tensor = torch.zeros(_COPIED, dtype=torch.uint8)
    tensor.to(device)
    torch.cuda.synchronize(device)

    def copy(number: int) -> int:
        tensor.to(device)
        torch.cuda.synchronize(device)
        return _COPIED

    return _speed(copy, 4)
