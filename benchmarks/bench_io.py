#!/usr/bin/env python3
"""Measure how fast weights and activations are read and written, compared with plain files of the same size, in GB/s.

Usage: bench_io.py WORK [--results FILE]

WORK must not exist; it is deleted at the end. Weights: a safetensors shard of 1 GiB, read tensor by tensor from the page cache as a run
reads it (with SHA-256 and the check for finite values) and without these; and from the disk, after the shard was dropped from the page
cache, at once and after a thread has read it ahead for as long as a window computes. Activations: a stream of 64 segments of 512 x 4096
in bf16 (256 MiB) in an activation store, one chunk per segment with its checksum, synced and not synced.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from cbqstream.activations.store import StreamShape
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.verified import VerifiedCheckpoint
from cbqstream.disk import Disk

RESULTS = Path(__file__).resolve().parent / "results" / "io.json"
CPU = torch.device("cpu")
TENSORS, TENSOR_SHAPE = 16, (4096, 8192)
SHAPE = StreamShape(64, 512, 4096)
WINDOW = 10.0
"""Seconds for reading ahead. A window of SmolLM2 takes 40 s on one core, a window of a larger model longer."""


def drop_from_page_cache(path: Path) -> None:
    """Write a file to the disk, and drop it from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(size: int, work: Callable[[], object]) -> float:
    """GB/s of `work`, which moves `size` bytes. It runs twice, and the faster run counts."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return size / min(times) / 1e9


def rates_of_weights(work: Path, tensors: int, tensor_shape: tuple[int, int], reading_ahead: float) -> dict[str, float]:
    """Rates of reading a shard of bf16 weights that is made in a folder, GB/s.

    Args:
        work: the folder.
        tensors: number of weights.
        tensor_shape: shape of each weight.
        reading_ahead: seconds for which a thread reads ahead.
    """
    shard = work / "shard.safetensors"
    save_file({f"t{index}": torch.full(tensor_shape, 0.5, dtype=torch.bfloat16) for index in range(tensors)}, shard)
    infos, size = read_header(shard), shard.stat().st_size

    def read_weights(source: Checkpoint | VerifiedCheckpoint) -> None:
        for tensor in infos:
            source.read(tensor, device=CPU)

    found = {
        "file, read": rate(size, lambda: shard.read_bytes()),
        "weights, read": rate(size, lambda: read_weights(Checkpoint(infos))),
        "weights, read and verified": rate(size, lambda: read_weights(VerifiedCheckpoint(infos))),
    }
    drop_from_page_cache(shard)
    source, began = VerifiedCheckpoint(infos), time.perf_counter()
    read_weights(source)
    found["weights, from the disk"] = size / (time.perf_counter() - began) / 1e9
    drop_from_page_cache(shard)
    with source.reading_ahead(list(infos)):
        time.sleep(reading_ahead)
    began = time.perf_counter()
    read_weights(source)
    found["weights, from the disk, read ahead"] = size / (time.perf_counter() - began) / 1e9
    return found


def rates_of_streams(work: Path, shape: StreamShape) -> dict[str, float]:
    """Rates of writing and reading a stream of a shape in a folder, and a plain file of its size, GB/s."""
    segments = [torch.randn(shape.seq_len, shape.hidden_size).to(shape.dtype) for _ in range(4)]
    size = shape.num_segments * segments[0].nbytes
    content = bytes(segments[0].view(torch.uint8).numpy().data)

    def write_stream(durable: bool) -> None:
        shutil.rmtree(work / "stream", ignore_errors=True)
        store = ZarrStore.create(work / "stream", shape, Disk(), durable=durable)
        for segment in range(shape.num_segments):
            store.write(segment, segments[segment % 4])

    def read_stream() -> None:
        store = ZarrStore.open(work / "stream", shape)
        for segment in range(shape.num_segments):
            store.read(segment)

    return {
        "file, written": rate(size, lambda: (work / "plain").write_bytes(content * shape.num_segments)),
        "stream, written": rate(size, lambda: write_stream(durable=False)),
        "stream, written and synced": rate(size, lambda: write_stream(durable=True)),
        "stream, read": rate(size, read_stream),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder to create, on the file system to measure")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    torch.set_num_threads(1)
    found = rates_of_weights(args.work, TENSORS, TENSOR_SHAPE, WINDOW) | rates_of_streams(args.work, SHAPE)
    for name, value in found.items():
        print(f"{name}: {value:.2f} GB/s")
    args.results.write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
