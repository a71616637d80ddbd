"""Which blocks each window holds, and which segments it learns from."""

from cbqstream.config import WindowConfig
from cbqstream.records import Window

_HELD_OUT_SHARE = 8


def schedule(first: int, stop: int, window: WindowConfig) -> list[Window]:
    """Windows over blocks `first` to `stop - 1`: window k starts at `first + k * (size - overlap)`; the last one is cut at the end.

    >>> [(w.start, w.stop) for w in schedule(0, 4, WindowConfig(size=2, overlap=1))]
    [(0, 2), (1, 3), (2, 4)]
    >>> [(w.start, w.stop) for w in schedule(0, 5, WindowConfig(size=3, overlap=0))]
    [(0, 3), (3, 5)]
    """
    stride = window.size - window.overlap
    windows: list[Window] = []
    start, frontier = first, first
    while frontier < stop:
        end = min(start + window.size, stop)
        windows.append(Window(len(windows), start, end, frontier, stop if end == stop else start + stride))
        start, frontier = start + stride, end
    return windows


def split_held_out(num_segments: int) -> tuple[list[int], list[int]]:
    """Segments to train on and segments of the held_out: the last eighth, or all for both where there are fewer than eight."""
    held_out = num_segments // _HELD_OUT_SHARE
    everything = list(range(num_segments))
    return (
        (everything[: num_segments - held_out], everything[num_segments - held_out :])
        if held_out
        else (everything, everything)
    )
