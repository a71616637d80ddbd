"""Writing segments on a thread while the next ones are being computed."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from cbqstream.activations.store import ActivationStore

WRITE_DEPTH = 4


@contextmanager
def write_behind(store: ActivationStore) -> Iterator[Callable[[int, Tensor], None]]:
    """Gives a function that takes what `store.write` takes: written soon, in the order of the calls, and all of it when the `with` outer.

    At most four segments wait. An error in writing is raised at a later call or at the end, and nothing is written after it.
    """
    waiting: deque[Future[float]] = deque()
    whole = True

    def write(segment: int, x_SD: Tensor) -> float:
        nonlocal whole
        began = store.writing()
        if whole:
            whole = False
            store.write(segment, x_SD)
            whole = True
        return store.writing() - began

    def wait() -> None:
        began = time.monotonic()
        spent = waiting.popleft().result()
        store.hidden += spent - min(spent, time.monotonic() - began)

    def submit(segment: int, x_SD: Tensor) -> None:
        # converted here: what waits should be small, and not on the device
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
