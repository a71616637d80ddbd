"""The schedule of windows, for any size and overlap of windows."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cbqstream.config import WindowConfig
from cbqstream.windows.schedule import schedule, split_held_out


@given(first=st.integers(0, 5), blocks=st.integers(1, 40), size=st.integers(1, 6), data=st.data())
def test_every_block_enters_one_window_first_and_leaves_after_one_window(first, blocks, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    windows = schedule(first, first + blocks, WindowConfig(size=size, overlap=overlap))
    assert [window.index for window in windows] == list(range(len(windows)))
    entered = [block for window in windows for block in range(window.frontier, window.stop)]
    left = [block for window in windows for block in range(window.start, window.next_start)]
    assert entered == left == list(range(first, first + blocks))
    for before, after in itertools.pairwise(windows):
        assert after.start == before.next_start == before.start + size - overlap
        assert after.frontier == before.stop
        assert before.stop - before.start == size
        assert before.stop - after.start == overlap


def test_80_blocks_in_windows_of_two_that_overlap_by_one_are_79_windows():
    windows = schedule(0, 80, WindowConfig(size=2, overlap=1))
    assert len(windows) == 79
    assert (windows[-1].start, windows[-1].stop, windows[-1].next_start) == (78, 80, 80)


def test_fewer_blocks_than_the_window_size_are_one_window():
    (window,) = schedule(0, 1, WindowConfig(size=3, overlap=2))
    assert (window.start, window.stop, window.next_start) == (0, 1, 1)


def test_the_last_eighth_of_the_segments_is_held_out():
    assert split_held_out(16) == (list(range(14)), [14, 15])
    assert split_held_out(8) == (list(range(7)), [7])


def test_the_split_of_fewer_than_eight_segments_has_all_of_them_in_both_parts():
    assert split_held_out(7) == (list(range(7)), list(range(7)))
