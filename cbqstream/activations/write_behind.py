"""Writing segments on a thread while the next ones are being computed."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from cbqstream.activations.store import ActivationStore

WRITE_DEPTH = 4


@contextmanager
def write_behind(store: ActivationStore) -> Iterator[Callable[[int, Tensor], None]]:
    """A function with the arguments of `store.write` that returns at once; everything is written, in order, when the `with` ends.

    At most four segments wait to be written. An error in writing is raised at a later call or at the end, and nothing is written after it.
    """
    waiting: deque[Future[None]] = deque()
    failed = False

    def write(segment: int, x_SD: Tensor) -> None:
        nonlocal failed
        if not failed:
            failed = True
            store.write(segment, x_SD)
            failed = False

    def wait() -> None:
        with store.measure("writing"):
            waiting.popleft().result()

    def submit(segment: int, x_SD: Tensor) -> None:
        # converted here, so that what waits is small and not on the device
        waiting.append(pool.submit(write, segment, x_SD.detach().to("cpu", store.shape.dtype)))
        if len(waiting) > WRITE_DEPTH:
            wait()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind") as pool:
        try:
            yield submit
            while waiting:
                wait()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
