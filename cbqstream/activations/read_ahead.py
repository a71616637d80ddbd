"""Reading of the next batches on a thread while the current batch is being computed."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from cbqstream.activations.store import ActivationStore

READ_DEPTH = 2


def read_batches(
    stores: Sequence[ActivationStore], batches: Sequence[Sequence[int]], device: torch.device
) -> Iterator[list[Tensor]]:
    """Yield batches of segments that a thread reads in advance.

    At most two batches are in memory besides the current batch. If reading a batch fails, the error is raised when that batch is due.
    Batches for CUDA are copied asynchronously from pinned memory.

    Args:
        stores: stores to read from.
        batches: the segment numbers of each batch.
        device: device of the batches.

    Yields:
        For each batch, one tensor [B, S, D] per store, in the dtype of that store.
    """
    pinned = device.type == "cuda"

    def load(batch: Sequence[int]) -> list[Tensor]:
        read = [torch.stack([store.read(segment) for segment in batch]) for store in stores]
        return [x_BSD.pin_memory() for x_BSD in read] if pinned else read

    def wait(batch: Future[list[Tensor]]) -> list[Tensor]:
        with stores[0].measure("reading"):
            tensors = batch.result()
        return [x_BSD.to(device, non_blocking=True) for x_BSD in tensors]

    waiting: deque[Future[list[Tensor]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        try:
            for position, batch in enumerate(batches):
                waiting.append(pool.submit(load, batch))
                if position >= READ_DEPTH:
                    yield wait(waiting.popleft())
            while waiting:
                yield wait(waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_shuffled_batches(segments: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Batches of `batch_size` segments in a random order; the last batch may be smaller."""
    order = torch.randperm(len(segments), generator=generator).tolist()
    return in_batches([segments[position] for position in order], batch_size)


def in_batches(segments: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of `batch_size` segments in the given order; the last batch may be smaller."""
    return [list(segments[start : start + batch_size]) for start in range(0, len(segments), batch_size)]
