"""Rows 3 to 7, 11, 16 and 17: real processes that are killed, stopped, starved of disk space, or not alone."""

import errno
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from toy import NIGHTLY, WINDOWS, one_line, sleep_until

from cbqstream.rundir.chain import Chain
from tiny import files_of


def some(numbers, every):
    """All of them at night, one in `every` else."""
    return list(numbers) if NIGHTLY else list(numbers)[::every]


def commit_done(toy) -> int:
    """Number of the last operation that belongs to a window."""
    return max(number for number, (name, path) in enumerate(toy.operations, 1) if path.endswith("/commits"))


def test_killed_at_an_operation(toy, tally):
    with tally(3, "SIGKILL before an operation of a window") as counted:
        for at in some(range(1, commit_done(toy) + 1), 12):
            out = toy.new_out()
            assert toy.run(toy.quantize(out), at=at, kind="kill").code == -signal.SIGKILL
            counted.add(redone=toy.finishes(out, begun=toy.windows_begun(at - 1)))


def test_killed_while_the_model_is_put_together(toy, tally):
    with tally(17, "SIGKILL before an operation of the export; finished runs") as counted:
        for at in some(range(commit_done(toy) + 1, len(toy.operations) + 1), 3):
            out = toy.new_out()
            assert toy.run(toy.quantize(out), at=at, kind="kill").code == -signal.SIGKILL
            if (out / "config.json").exists():
                assert files_of(out) == toy.expected
            counted.add(redone=toy.finishes(out, begun=WINDOWS, keep=True))
            again = toy.run(toy.quantize(out))
            assert (again.code, again.windows) == (0, 0)
            assert files_of(out) == toy.expected
            shutil.rmtree(out)


ERRORS = {"ENOSPC": 74, "EIO": 74, "EDQUOT": 74, "memory": 69, "SIGINT": 75}


def test_an_operation_fails(toy, tally):
    """Every operation with every error at night; else a few, in turn."""
    everything = list(itertools.product(range(1, len(toy.operations) + 1), ERRORS))
    with tally(4, "an operation fails: full, broken, no memory, Ctrl-C") as counted:
        for at, kind in some(everything, 46):
            out = toy.new_out()
            fault = {"kind": "signal", "which": signal.SIGINT} if kind == "SIGINT" else {"kind": kind}
            ended = toy.run(toy.quantize(out), at=at, **fault)
            if ended.code:
                assert ended.code == ERRORS[kind], (at, kind, ended.err)
                assert one_line(ended.err), ended.err
            else:  # it had happened in tidying up, where nothing can be lost
                assert toy.operations[at - 1][0] in ("remove_tree", "make_folder"), (at, kind)
                assert files_of(out) == toy.expected
            run = Path(f"{out}.run")
            if (run / "run.json").exists() and (run / "tmp").exists():
                assert not list((run / "tmp").iterdir()), f"{kind} at {at} left its files on a full disk"
            if ended.code:
                counted.add(redone=toy.finishes(out, begun=toy.windows_begun(at - 1)))
            else:
                counted.add()


def test_killed_at_any_time(toy, tally):
    chance = random.Random(5)
    with tally(5, "SIGKILL at a random time; chains of five") as counted:
        for kills in [1] * (1000 if NIGHTLY else 8) + [5] * (50 if NIGHTLY else 1):
            out = toy.new_out()
            for _ in range(kills):
                process = toy.start(toy.quantize(out))
                time.sleep(chance.uniform(0, toy.seconds))
                toy.signal(process, signal.SIGKILL)
                assert toy.wait(process).code in (-signal.SIGKILL, 0)
            counted.add(faults=kills)
            if files_of(out) if out.exists() else {}:
                assert files_of(out) == toy.expected
            else:
                toy.finishes(out)


def test_stopped_at_any_time(toy, tally):
    chance = random.Random(6)
    with tally(6, "SIGTERM or SIGINT at a random time") as counted:
        for number in range(300 if NIGHTLY else 8):
            out = toy.new_out()
            process = toy.start(toy.quantize(out))
            time.sleep(chance.uniform(0, toy.seconds))
            began = time.monotonic()
            toy.signal(process, (signal.SIGTERM, signal.SIGINT)[number % 2])
            ended = toy.wait(process)
            assert time.monotonic() - began < max(2, 2 * toy.seconds)  # a whole run may take longer where others run
            counted.add()
            if ended.code == 0:
                continue
            # before Python has set its handlers the signal does what it always does; then nothing has begun
            if ended.code in (-signal.SIGTERM, -signal.SIGINT):
                assert not Path(f"{out}.run").exists()
            else:
                assert ended.code == 75, ended.err
                assert one_line(ended.err)
                assert "To go on: " in ended.err or not Path(f"{out}.run").exists()
            toy.finishes(out)


def test_a_second_signal_does_not_wait(toy, tally):
    """The first one meets a process that is held up for good where it tidies up."""
    with tally(6, "a second Ctrl-C") as counted:
        out = toy.new_out()
        process = toy.start(toy.quantize(out), patch="stuck_while_leaving")
        sleep_until(lambda: (Path(f"{out}.run") / "tmp" / "acts").exists())
        toy.signal(process, signal.SIGINT)
        sleep_until(lambda: (toy.folder / "stuck").exists())
        toy.signal(process, signal.SIGINT)
        assert toy.wait(process).code == 130
        (toy.folder / "stuck").unlink()
        counted.add(faults=2)
        toy.finishes(out)


def committed_to_begin(out) -> bool:
    return (Path(f"{out}.run") / "run.json").exists()


def committed_all(toy, out) -> bool:
    return toy.committed(out) == WINDOWS


def test_a_disk_that_is_full(toy, tally, tmpfs):
    """With less room than it takes at its largest, down to a tenth of that; then it grows."""
    place = tmpfs("size=64k")

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)

    needed = 600 << 10
    with tally(7, "a tmpfs with 10 to 100 % of the room") as counted:
        for share in range(10, 101, 4) if NIGHTLY else (10, 45, 70):
            resize(needed * share // 100)
            out = place / f"out-{share}"
            ended = toy.run(toy.quantize(out))
            counted.add()
            if ended.code:
                assert ended.code == 74, ended.err
                assert one_line(ended.err)
                assert "Free some space" in ended.err
                assert " GiB" in ended.err or not committed_to_begin(out) or committed_all(toy, out)
            resize(64 << 20)
            if ended.code:
                toy.finishes(out)
            else:
                shutil.rmtree(out)
                shutil.rmtree(f"{out}.run")


def test_a_file_that_must_not_grow(toy, tally):
    with tally(7, "RLIMIT_FSIZE") as counted:
        largest = max(map(len, toy.expected.values()))
        for limit in range(500, largest, largest // 10) if NIGHTLY else (500, 20_000):
            out = toy.new_out()
            ended = toy.run(toy.quantize(out), file_size=limit)
            assert (ended.code, one_line(ended.err)) == (74, True), ended.err
            assert os.strerror(errno.EFBIG) in ended.err
            counted.add()
            toy.finishes(out)


def test_a_log_that_cannot_be_written(toy, tally):
    with tally(7, "a log on /dev/full") as counted:
        out = toy.new_out()
        ended = toy.run(toy.quantize(out, "--log-json", "/dev/full"))
        assert ended.code == 74
        assert ended.err == "cbqstream: error: /dev/full: No space left on device. Use another --log-json.\n"
        counted.add(redone=toy.finishes(out, begun=1))


def test_two_processes(toy, tally):
    with tally(11, "others at the same time") as counted:
        for others in (1, 7) if NIGHTLY else (1,):
            out = toy.new_out()
            slow = toy.quantize(out, "--epochs", 3000)
            first = toy.start(slow)
            sleep_until(lambda out=out: (Path(f"{out}.run") / "tmp" / "targets").exists())
            before = sorted(str(path) for path in Path(f"{out}.run").rglob("*") if "tmp" not in path.parts)
            for _ in range(others):
                ended = toy.run(slow)
                assert (ended.code, one_line(ended.err)) == (75, True)
                assert "another process is working on this run" in ended.err
                assert ended.seconds < 2
                counted.add()
            assert before == sorted(str(path) for path in Path(f"{out}.run").rglob("*") if "tmp" not in path.parts)
            toy.signal(first, signal.SIGKILL)
            toy.wait(first)  # its lock file stays and means nothing
            shutil.rmtree(f"{out}.run")


def test_two_first_starts(toy, tally):
    """The same command twice at once: one begins the run, the other finds it locked, or done."""
    with tally(11, "two first starts at once") as counted:
        for _ in range(20 if NIGHTLY else 4):
            out = toy.new_out()
            ended = [toy.wait(number) for number in [toy.start(toy.quantize(out)) for _ in range(2)]]
            assert sorted(ended.code for ended in ended) in ([0, 0], [0, 75]), [ended.err for ended in ended]
            assert all(one_line(ended.err) for ended in ended if ended.code)
            assert sum(ended.windows for ended in ended) == WINDOWS
            assert files_of(out) == toy.expected
            counted.add(runs=2)


def test_two_runs_with_one_output(toy, tally):
    """Each has a run directory of its own. The first that is done has OUT, whole; the other says so, and loses nothing."""
    with tally(11, "two runs with one OUT") as counted:
        for number in range(6 if NIGHTLY else 2):
            out, runs = toy.new_out(), [toy.new_out(), toy.new_out()]
            commands = [toy.quantize(out, "--run-dir", run, "--seed", 3 + seed) for seed, run in enumerate(runs)]
            ended = [
                toy.wait(process) for process in [toy.start(command) for command in commands[:: 1 - 2 * (number % 2)]]
            ]
            late = next(one for one in ended if ended.code)
            assert sorted(ended.code for ended in ended) in ([0, 2], [0, 74]), late.err
            assert one_line(late.err)
            assert re.search(r"Give another (OUT|place)\.", late.err), late.err
            looked = [toy.run(["check", str(path), "--read-data"]) for path in (out, *runs)]
            assert [ended.code for ended in looked] == [0, 0, 0], [ended.err for ended in looked]
            shutil.rmtree(out)
            for command, run in zip(commands, runs, strict=True):
                assert toy.run(command).code == 0
                assert Chain.read(run).is_result(out)
                shutil.rmtree(out)
            assert not list(out.parent.glob(f"{out.name}.*cbqstream*"))
            counted.add(runs=2)


def test_check_beside_a_live_run(toy, tally):
    """What it says is true of some moment: never that something is broken."""
    with tally(11, "check and status beside a run that goes on") as counted:
        for _ in range(5 if NIGHTLY else 1):
            out = toy.new_out()
            run = Path(f"{out}.run")
            process = toy.start(toy.quantize(out, "--epochs", 30))
            sleep_until(lambda run=run: (run / "run.json").exists())
            while toy.committed(out) < WINDOWS:
                for command in (["check", str(run), "--read-data"], ["status", str(run)]):
                    looked = toy.run(command)
                    assert (looked.code, looked.err) == (0, ""), looked.err
                    counted.add()
            assert toy.wait(process).code == 0


def test_no_locks_on_this_file_system(toy, tally):
    with tally(11, "flock is not supported") as counted:
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="no_locks")
        assert (ended.code, one_line(ended.err)) == (74, True), ended.err
        assert "cannot be locked: Function not implemented" in ended.err
        counted.add()
        shutil.rmtree(f"{out}.run", ignore_errors=True)


def test_device_memory(toy, tally):
    with tally(16, "device out of memory: once, for good") as counted:
        out = toy.new_out()
        assert toy.run(toy.quantize(out), patch="out_of_memory_once").code == 0
        assert files_of(out) == toy.expected
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="out_of_memory_for_good")
        assert (ended.code, one_line(ended.err)) == (69, True)
        assert (
            "window 2 needs more memory than there is (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.)"
            in ended.err
        )
        counted.add(runs=2, faults=2, redone=toy.finishes(out, begun=2))


def test_losses_that_are_not_finite(toy, tally):
    """One window goes back to where it began and says so; when it happens again and again, the run does not go on."""
    with tally(16, "NaN in a training step") as counted:
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="nan_in_one_step")
        assert ended.code == 0
        assert ended.out.splitlines()[0].endswith("reverted: not finite")
        fallbacks = [commit["report"]["reverted"] for commit in Chain.read(Path(f"{out}.run")).commits]
        assert fallbacks[0] == "not finite"
        assert "not finite" not in fallbacks[1:]
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="nan_in_every_step")
        assert (ended.code, one_line(ended.err)) == (65, True)
        assert "in 2 windows the loss was not finite, first in window 1" in ended.err
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="nan_from_the_second_window_on")
        assert (ended.code, one_line(ended.err)) == (65, True)
        assert "in 2 windows the loss was not finite, first in window 2" in ended.err
        counted.add(runs=3, faults=3)
