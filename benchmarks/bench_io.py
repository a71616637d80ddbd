#!/usr/bin/env python3
"""How fast weights and activations are read and written, beside the same bytes through plain files. GB/s, from and to the page cache.

Usage: bench_io.py WORK [--results FILE]

Weights: a safetensors shard of 1 GiB, read tensor by tensor as a run reads it (with its SHA-256, finite) and without that; and again after
it was dropped from the page cache, at once and when a thread has read it ahead for as long as a window computes. Activations:
a stream of 64 segments of 512 x 4096 in bf16 (256 MiB), as a store keeps it: a chunk a segment with its checksum, synced and not synced.
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
SHAPE = StreamShape(64, 512, 4096)
WINDOW = 10.0
"""Seconds; those of SmolLM2 take 40 on one core, those of larger models longer."""


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(size: int, work: Callable[[], object]) -> float:
    """GB/s, the better of two."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return size / min(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    torch.set_num_threads(1)
    shard, plain = args.work / "shard.safetensors", args.work / "plain"
    tensors = {f"t{index}": torch.full((4096, 8192), 0.5, dtype=torch.bfloat16) for index in range(16)}
    save_file(tensors, shard)
    infos, size = read_header(shard), shard.stat().st_size
    found = {"file, read": rate(size, lambda: shard.read_bytes())}
    for name, source in (("weights, read", Checkpoint), ("weights, read, hashed and looked at", VerifiedCheckpoint)):
        opened = source(infos)
        found[name] = rate(size, lambda opened=opened: [opened.read(tensor, device=CPU) for tensor in infos])
    forget(shard)
    opened, began = VerifiedCheckpoint(infos), time.perf_counter()
    for tensor in infos:
        opened.read(tensor, device=CPU)
    found["weights, from the disk"] = size / (time.perf_counter() - began) / 1e9
    forget(shard)
    with opened.reading_ahead(list(infos)):
        time.sleep(WINDOW)
    began = time.perf_counter()
    for tensor in infos:
        opened.read(tensor, device=CPU)
    found["weights, from the disk, read ahead"] = size / (time.perf_counter() - began) / 1e9

    segments = [torch.randn(SHAPE.seq_len, SHAPE.hidden_size).to(SHAPE.dtype) for _ in range(4)]
    size = SHAPE.num_segments * segments[0].nbytes
    content = bytes(segments[0].view(torch.uint8).numpy().data)

    def write(durable: bool) -> None:
        shutil.rmtree(args.work / "stream", ignore_errors=True)
        store = ZarrStore.create(args.work / "stream", SHAPE, Disk(), durable=durable)
        for segment in range(SHAPE.num_segments):
            store.write(segment, segments[segment % 4])

    def read() -> None:
        store = ZarrStore.open(args.work / "stream", SHAPE)
        for segment in range(SHAPE.num_segments):
            store.read(segment)

    found["file, written"] = rate(size, lambda: plain.write_bytes(content * SHAPE.num_segments))
    found["stream, written"] = rate(size, lambda: write(durable=False))
    found["stream, written and synced"] = rate(size, lambda: write(durable=True))
    found["stream, read"] = rate(size, read)
    for name, value in found.items():
        print(f"{name}: {value:.2f} GB/s")
    args.results.write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
