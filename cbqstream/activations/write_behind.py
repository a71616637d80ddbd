"""Writing of segments on a thread while the next segments are being computed."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from cbqstream.activations.store import ActivationStore

WRITE_DEPTH = 4


@contextmanager
def write_behind(store: ActivationStore) -> Iterator[Callable[[int, Tensor], None]]:
    """Provide a function that writes segments in the background, inside a `with`.

    The function has the arguments of `store.write` and does not wait for the write unless more than four segments are waiting. Segments are
    written in the order of the calls, and all of them are written when the `with` ends. If a write fails, the error is raised by a later
    call or at the end, and no further segments are written. Segments on CUDA are copied to pinned memory, and only the thread waits for the
    copy.
    """
    waiting: deque[Future[None]] = deque()
    failed = False

    def write(segment: int, copied: Callable[[], Tensor]) -> None:
        nonlocal failed
        if not failed:
            failed = True
            store.write(segment, copied())
            failed = False

    def wait() -> None:
        with store.measure("writing"):
            waiting.popleft().result()

    def submit(segment: int, x_SD: Tensor) -> None:
        # converted before it waits, so that it takes little memory, and none on the device
        waiting.append(pool.submit(write, segment, _copy_to_cpu(x_SD.detach().to(store.shape.dtype))))
        if len(waiting) > WRITE_DEPTH:
            wait()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind") as pool:
        try:
            yield submit
            while waiting:
                wait()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _copy_to_cpu(x_SD: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU, and return a function that waits for the copy and gives it."""
    if x_SD.device.type != "cuda":
        copied_SD = x_SD.to("cpu")
        return lambda: copied_SD
    copy_SD = torch.empty(x_SD.shape, dtype=x_SD.dtype, pin_memory=True)
    copy_SD.copy_(x_SD, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy_SD

    return wait
