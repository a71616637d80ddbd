"""The blocks of each window, and its training and held-out segments."""

from cbqstream.config import WindowConfig
from cbqstream.records import Window

_HELD_OUT_SHARE = 8
"""Ratio of the number of segments to the number of held-out segments."""


def schedule(first: int, stop: int, window: WindowConfig) -> list[Window]:
    """Windows over blocks `first` to `stop - 1`. Window k starts at `first + k * (size - overlap)`; the last one ends at `stop`.

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
    """Segments to train on, and held-out segments: the last eighth. With fewer than eight segments, both are all of them."""
    held_out = num_segments // _HELD_OUT_SHARE
    everything = list(range(num_segments))
    if not held_out:
        return everything, everything
    return everything[: num_segments - held_out], everything[num_segments - held_out :]
