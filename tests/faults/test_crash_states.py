"""Rows 1 and 2: a run recovers from each state that a crash may leave, and a protocol without a sync or in another order would not.

The states come from the model of a file system in crash_model.py. The tests of row 2 show that the model detects a missing sync.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from crash_model import Event, Recorder, lay_out, states
from toy import NIGHTLY, SAMPLES, STEPS

from cbqstream import quantize
from cbqstream.config import CalibrationConfig, QuantizeConfig, ReconstructionConfig
from cbqstream.disk import Disk
from cbqstream.errors import CbqstreamError
from cbqstream.records import WindowReport
from cbqstream.rundir.chain import Chain
from cbqstream.rundir.journal import open_journal
from cbqstream.scheme import Scheme
from tiny import SEQ_LEN, files_of

MEMORY = Path("/dev/shm")
"""A file system in memory. It is used if the machine has it, because no state needs to outlive the process."""


class Recorded:
    """The events of a whole run, and the files of its directory before the first window and after each window."""

    def __init__(self, toy, folder: Path) -> None:
        config = QuantizeConfig(
            model=str(toy.model),
            out=str(folder / "out"),
            scheme=Scheme(num_bits=4, group_size=32),
            calibration=CalibrationConfig(dataset=str(toy.tokens), num_samples=SAMPLES, seq_len=SEQ_LEN),
            reconstruction=ReconstructionConfig(epochs=STEPS, batch_size=4),
            threads=1,
            device="cpu",
        )
        self.folder, disk = folder, Recorder(folder)
        self.done = [{}]

        def listen(event):
            if len(self.done) == 1 and not self.done[0]:
                self.done[0] = self._run_files()
            if isinstance(event, WindowReport):
                self.done.append(self._run_files())

        quantize(config, listen, disk)
        self.events = disk.events
        self.out = files_of(folder / "out")
        self.record = Chain.read(folder / "out.run").run

    def _run_files(self) -> dict[str, bytes]:
        files = files_of(self.folder / "out.run")
        return {path: content for path, content in files.items() if path != "LOCK" and not path.startswith("tmp/")}

    def violation(self, state: dict[str, bytes | None], number: int, base: Path) -> str | None:
        """The reason why a state after the first `number` events does not recover as it must; None if it does.

        Recovery must give exactly the files that the run had after some window. Windows whose commit had returned must not be lost.
        """
        promised = sum(event.kind == "fsyncdir" and event.path == "out.run/commits" for event in self.events[:number])
        base.mkdir()
        try:
            lay_out(state, base)
            published = files_of(base / "out") if (base / "out").exists() else {}
            if published not in ({}, self.out):
                return "an incomplete result has its final name"
            if number == len(self.events) and not published:
                return "the run had ended, and its result is missing"
            with open_journal(base / "out.run", Disk(), self.record) as journal:
                reached = journal.chain.next_window
            found = files_of(base / "out.run")
            found.pop("LOCK")
            if reached < promised:
                return f"{reached} windows are left of {promised} that were committed"
            if found != self.done[reached]:
                return f"other files than {reached} windows leave: {sorted(set(found) ^ set(self.done[reached]))}"
        except (CbqstreamError, OSError) as error:
            return str(error)
        finally:
            shutil.rmtree(base)
        return None


@pytest.fixture(scope="module")
def recorded(toy, tmp_path_factory):
    """A recorded run of the toy."""
    return Recorded(toy, tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder in which states are written to disk. fsync does nothing, because recovery need not be durable there."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    folder = MEMORY / f"cbqstream-{os.getpid()}" if MEMORY.is_dir() else tmp_path / "base"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def violations(recorded: Recorded, events: list[Event], base: Path, **chosen: int):
    """Generate, for each state, the number of events until then, and its `violation`."""
    for number, state in states(events, **chosen):
        yield number, recorded.violation(state, number, base)


def test_each_state_that_a_crash_may_leave_recovers_to_a_window(recorded, base, tally):
    with tally(1, "crash states of the real operations") as counted:
        for number, wrong in violations(recorded, recorded.events, base):
            assert wrong is None, f"after {recorded.events[number - 1]}: {wrong}"
            counted.add()


def without(events: list[Event], index: int) -> list[Event]:
    """The events, with one of them replaced by an event that does nothing."""
    return [replace(event, kind="nothing") if number == index else event for number, event in enumerate(events)]


def is_caught(recorded: Recorded, events: list[Event], base: Path, first: int) -> bool:
    """Whether a state after the first `first` events does not recover, so that the crash states detect the change of the events."""
    return any(wrong is not None for _, wrong in violations(recorded, events, base, first=first))


def test_the_crash_states_detect_each_missing_sync(recorded, base, tally):
    """Without any one of its syncs, the protocol leaves a state that does not recover."""
    events = recorded.events
    syncs = [index for index, event in enumerate(events) if event.kind in ("fsync", "fsyncdir")]
    with tally(2, "mutants: one sync left out") as counted:
        missed = []
        for index in syncs if NIGHTLY else syncs[:: len(syncs) // 10]:
            counted.add()
            if not is_caught(recorded, without(events, index), base, index):
                missed.append(f"{events[index].kind} {events[index].path}")
        assert not missed


def find(events: list[Event], kind: str, *, path: str = "", target: str = "") -> int:
    """Number of the first event of a kind with a path, or with a target."""
    return next(
        index
        for index, event in enumerate(events)
        if event.kind == kind and (not path or event.path == path) and (not target or event.target == target)
    )


def commit_before_its_streams(events: list[Event]) -> list[Event]:
    """The events, with the first window committed before its streams have their final name."""
    commit, acts = (find(events, "rename", target=f"out.run/{name}") for name in ("commits/00000", "acts/00001"))
    write = find(events, "create", path="out.run/tmp/commit")
    return [*events[:acts], *events[write : commit + 2], *events[acts:write], *events[commit + 2 :]]


def streams_deleted_before_the_commit(events: list[Event]) -> list[Event]:
    """The events, with the streams that the second window read deleted before that window is committed."""
    commit = find(events, "rename", target="out.run/commits/00001")
    gone = find(events, "unlink", path="out.run/acts/00001")
    start = next(index for index in range(commit, gone) if events[index].kind == "unlink")
    return [*events[:commit], *events[start : gone + 1], *events[commit:start], *events[gone + 1 :]]


def commit_written_in_place(events: list[Event]) -> list[Event]:
    """The events, with the first commit written under its final name instead of renamed."""
    write, commit = (
        find(events, "create", path="out.run/tmp/commit"),
        find(events, "rename", target="out.run/commits/00000"),
    )
    place = "out.run/commits/00000"
    written = [replace(events[write], path=place), replace(events[write + 1], path=place)]
    return [*events[:write], *written, *events[commit + 1 :]]


def parts_named_after_the_commit(events: list[Event]) -> list[Event]:
    """The events, with the parts of the first window renamed into place after its commit."""
    parts, commit = (
        find(events, "rename", target="out.run/parts/00000"),
        find(events, "rename", target="out.run/commits/00000"),
    )
    return [*events[:parts], *events[parts + 2 : commit + 2], *events[parts : parts + 2], *events[commit + 2 :]]


ORDERS = [
    commit_before_its_streams,
    streams_deleted_before_the_commit,
    commit_written_in_place,
    parts_named_after_the_commit,
]


@pytest.mark.parametrize("mutate", ORDERS, ids=lambda mutate: mutate.__name__)
def test_the_crash_states_detect_a_wrong_order_of_operations(recorded, base, tally, mutate):
    """With a wrong order of operations, the protocol leaves a state that does not recover."""
    mutated = mutate(recorded.events)
    assert mutated != recorded.events
    first = next(index for index, pair in enumerate(zip(mutated, recorded.events, strict=False)) if pair[0] != pair[1])
    with tally(2, "mutants: another order") as counted:
        counted.add()
        assert is_caught(recorded, mutated, base, first)
