"""Rows 3 to 7, 11, 16 and 17: processes that are killed or stopped, run out of disk space or memory, or share a run with others."""

import errno
import itertools
import json
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
from tiny import files_of, save_model


def some(numbers, every):
    """All of the numbers in a nightly run, and one in `every` otherwise."""
    return list(numbers) if NIGHTLY else list(numbers)[::every]


def commit_done(toy) -> int:
    """Number of the last durable operation of the last window. The operations after it write the result."""
    return max(number for number, (name, path) in enumerate(toy.operations, 1) if path.endswith("/commits"))


def test_a_run_killed_before_an_operation_of_a_window_finishes(toy, tally):
    """SIGKILL comes before a durable operation of a window. At most one window is quantized again."""
    with tally(3, "SIGKILL before an operation of a window") as counted:
        for at in some(range(1, commit_done(toy) + 1), 12):
            out = toy.new_out()
            assert toy.run(toy.quantize(out), at=at, kind="kill").code == -signal.SIGKILL
            counted.add(redone=toy.finishes(out, begun=toy.windows_begun(at - 1)))


def test_a_run_killed_while_the_result_is_written_finishes(toy, tally):
    """SIGKILL comes before a durable operation after the last window. A config.json in OUT exists only if the result is complete.

    No window is quantized again, neither then nor when the command is given once more for the finished run.
    """
    with tally(17, "SIGKILL before an operation of the export; finished runs") as counted:
        for at in some(range(commit_done(toy) + 1, len(toy.operations) + 1), 3):
            out = toy.new_out()
            assert toy.run(toy.quantize(out), at=at, kind="kill").code == -signal.SIGKILL
            if (out / "config.json").exists():
                assert files_of(out) == toy.expected
            counted.add(redone=toy.finishes(out, begun=WINDOWS, keep=True))
            repeated = toy.run(toy.quantize(out))
            assert (repeated.code, repeated.windows) == (0, 0)
            assert files_of(out) == toy.expected
            shutil.rmtree(out)


def test_a_run_killed_inside_a_window_computes_no_finished_expert_again(toy, tmp_path, tally):
    """SIGKILL comes before a durable operation of a run with experts alone. Experts that were durable then are not reconstructed again."""
    model, log = save_model(tmp_path / "model", "mixtral"), tmp_path / "operations.json"
    alone = ("--experts", "alone", "--window-size", 1, "--overlap", 0)

    def run(out, **more):
        return toy.run(toy.quantize(out, *alone, model=model), patch="groups_of_one_expert", **more)

    def experts(operations):
        """Number of experts that became durable."""
        return sum(
            name == "rename" and "/partial/experts-" in path and path.endswith(".json") for name, path in operations
        )

    whole = toy.new_out()
    ended = run(whole, count=log)
    assert ended.code == 0, ended.err
    expected, operations = files_of(whole), json.loads(log.read_text())
    number = experts(operations)
    with tally(3, "SIGKILL inside a window of experts alone") as counted:
        for at in some(range(30, len(operations)), 61):
            out = toy.new_out()
            assert run(out, at=at, kind="kill").code == -signal.SIGKILL
            folder = Path(f"{out}.run")
            committed = max((path.stat().st_mtime_ns for path in folder.glob("commits/*")), default=0)
            # results of a window that was committed just before the end are still there
            left = sum(path.stat().st_mtime_ns > committed for path in folder.glob("partial/experts-*.json"))
            done = min(left, number // 4) + toy.committed(out) * (number // 4)
            assert run(out, count=log).code == 0
            assert files_of(out) == expected
            assert experts(json.loads(log.read_text())) == number - done
            counted.add()


ERRORS = {"ENOSPC": 74, "EIO": 74, "EDQUOT": 74, "memory": 69, "SIGINT": 75}
"""Exit code of a run, by the fault that happens before one of its operations."""


def test_a_run_finishes_after_an_operation_failed(toy, tally):
    """A durable operation fails with an error, memory runs out, or SIGINT comes. The run ends with one line, leaves tmp/ empty and resumes.

    An error while files are deleted that are no longer needed is ignored.
    """
    everything = list(itertools.product(range(1, len(toy.operations) + 1), ERRORS))
    with tally(4, "an operation fails: full, broken, no memory, Ctrl-C") as counted:
        for at, kind in some(everything, 46):
            out = toy.new_out()
            fault = {"kind": "signal", "which": signal.SIGINT} if kind == "SIGINT" else {"kind": kind}
            ended = toy.run(toy.quantize(out), at=at, **fault)
            if ended.code:
                assert ended.code == ERRORS[kind], (at, kind, ended.err)
                assert one_line(ended.err), ended.err
            else:
                assert toy.operations[at - 1][0] in ("remove_tree", "make_folder"), (at, kind)
                assert files_of(out) == toy.expected
            run = Path(f"{out}.run")
            if (run / "run.json").exists() and (run / "tmp").exists():
                assert not list((run / "tmp").iterdir()), f"{kind} at {at} left files in tmp/"
            if ended.code:
                counted.add(redone=toy.finishes(out, begun=toy.windows_begun(at - 1)))
            else:
                counted.add()


def test_a_run_killed_at_random_times_finishes(toy, tally):
    """SIGKILL comes at a random time, once or five times in a row."""
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


def test_a_run_stopped_by_a_signal_at_a_random_time_finishes(toy, tally):
    """SIGTERM or SIGINT ends the process within seconds, with one line that gives the command that resumes the run."""
    chance = random.Random(6)
    with tally(6, "SIGTERM or SIGINT at a random time") as counted:
        for number in range(300 if NIGHTLY else 8):
            out = toy.new_out()
            process = toy.start(toy.quantize(out))
            time.sleep(chance.uniform(0, toy.seconds))
            began = time.monotonic()
            toy.signal(process, (signal.SIGTERM, signal.SIGINT)[number % 2])
            ended = toy.wait(process)
            assert time.monotonic() - began < max(2, 2 * toy.seconds)  # other processes may make the run slower
            counted.add()
            if ended.code == 0:
                continue
            # before the handlers are set, the signal has its default action, and no run has begun
            if ended.code in (-signal.SIGTERM, -signal.SIGINT):
                assert not Path(f"{out}.run").exists()
            else:
                assert ended.code == 75, ended.err
                assert one_line(ended.err)
                assert "To resume: " in ended.err or not Path(f"{out}.run").exists()
            toy.finishes(out)


def test_a_second_ctrl_c_ends_a_process_that_hangs_after_the_first_one(toy, tally):
    """After the first SIGINT the process hangs where it empties tmp/. The second one ends it at once, with exit code 130."""
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


def has_begun(out) -> bool:
    """Whether the run directory for `out` has a run.json."""
    return (Path(f"{out}.run") / "run.json").exists()


def has_all_windows(toy, out) -> bool:
    """Whether all windows of the run for `out` are committed."""
    return toy.committed(out) == WINDOWS


def test_a_run_on_a_full_disk_finishes_when_there_is_space(toy, tally, tmpfs):
    """The disk has 10 to 100 % of the space that a run takes at most. A run that fails says how much it needs, and resumes later.

    The number of bytes is printed if the disk became full in a window.
    """
    place = tmpfs("size=64k")

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)

    needed = 600 << 10
    with tally(7, "a tmpfs with 10 to 100 % of the needed space") as counted:
        for share in range(10, 101, 4) if NIGHTLY else (10, 45, 70):
            resize(needed * share // 100)
            out = place / f"out-{share}"
            ended = toy.run(toy.quantize(out))
            counted.add()
            if ended.code:
                assert ended.code == 74, ended.err
                assert one_line(ended.err)
                assert "Free some space" in ended.err
                assert " GiB" in ended.err or not has_begun(out) or has_all_windows(toy, out)
            resize(64 << 20)
            if ended.code:
                toy.finishes(out)
            else:
                shutil.rmtree(out)
                shutil.rmtree(f"{out}.run")


def test_a_run_whose_files_may_not_grow_finishes_without_the_limit(toy, tally):
    """RLIMIT_FSIZE limits the size of files: the run ends with exit code 74, and the message has the file and the limit.

    Nothing is at OUT, and the run resumes without the limit.
    """
    with tally(7, "RLIMIT_FSIZE") as counted:
        largest = max(map(len, toy.expected.values()))
        for limit in range(500, largest, largest // 10) if NIGHTLY else (500, 20_000):
            out = toy.new_out()
            ended = toy.run(toy.quantize(out), file_size=limit)
            assert (ended.code, one_line(ended.err)) == (74, True), ended.err
            remedy = (
                rf"A file may have {limit:,} bytes \(ulimit -f\)\. Raise the limit and run the same command again\."
            )
            message = (
                rf"cbqstream: error: {re.escape(str(out))}\S+: \w+ failed: {os.strerror(errno.EFBIG)}\. {remedy}\n"
            )
            assert re.fullmatch(message, ended.err)
            assert not out.exists()
            counted.add()
            toy.finishes(out)


def test_a_log_on_a_full_disk_is_named_in_the_error(toy, tally):
    """The file of --log-json is on a full disk: the error names it, and the run resumes without a log."""
    with tally(7, "a log on /dev/full") as counted:
        out = toy.new_out()
        ended = toy.run(toy.quantize(out, "--log-json", "/dev/full"))
        assert ended.code == 74
        assert ended.err == "cbqstream: error: /dev/full: No space left on device. Use another --log-json.\n"
        counted.add(redone=toy.finishes(out, begun=1))


def test_further_processes_do_not_touch_a_run_that_is_locked(toy, tally):
    """A second process with the same command ends at once with exit code 75. The lock ends with the process that holds it."""
    with tally(11, "others at the same time") as counted:
        for others in (1, 7) if NIGHTLY else (1,):
            out = toy.new_out()
            slow = toy.quantize(out, "--epochs", 3000)
            first = toy.start(slow)
            sleep_until(lambda out=out: (Path(f"{out}.run") / "tmp" / "parts").exists())
            before = sorted(str(path) for path in Path(f"{out}.run").rglob("*") if "tmp" not in path.parts)
            for _ in range(others):
                ended = toy.run(slow)
                assert (ended.code, one_line(ended.err)) == (75, True)
                assert "another process is working on this run" in ended.err
                assert ended.seconds < 2
                counted.add()
            assert before == sorted(str(path) for path in Path(f"{out}.run").rglob("*") if "tmp" not in path.parts)
            toy.signal(first, signal.SIGKILL)
            toy.wait(first)
            shutil.rmtree(f"{out}.run")


def test_one_of_two_processes_started_together_makes_the_run(toy, tally):
    """Two processes with the same command start together. One begins the run; the other finds it locked or finished."""
    with tally(11, "two first starts at once") as counted:
        for _ in range(20 if NIGHTLY else 4):
            out = toy.new_out()
            both = [toy.wait(number) for number in [toy.start(toy.quantize(out)) for _ in range(2)]]
            assert sorted(ended.code for ended in both) in ([0, 0], [0, 75]), [ended.err for ended in both]
            assert all(one_line(ended.err) for ended in both if ended.code)
            assert sum(ended.windows for ended in both) == WINDOWS
            assert files_of(out) == toy.expected
            counted.add(runs=2)


def test_the_first_of_two_runs_with_one_out_has_it(toy, tally):
    """Two runs with run directories of their own have the same OUT. One finishes, the other is refused and keeps its windows."""
    with tally(11, "two runs with one OUT") as counted:
        for number in range(6 if NIGHTLY else 2):
            out, runs = toy.new_out(), [toy.new_out(), toy.new_out()]
            commands = [toy.quantize(out, "--run-dir", run, "--seed", 3 + seed) for seed, run in enumerate(runs)]
            both = [
                toy.wait(process) for process in [toy.start(command) for command in commands[:: 1 - 2 * (number % 2)]]
            ]
            late = next(ended for ended in both if ended.code)
            assert sorted(ended.code for ended in both) in ([0, 2], [0, 74]), late.err
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


def test_check_and_status_find_no_problem_in_a_run_in_progress(toy, tally):
    """`check` and `status` are called again and again while a process works on the run."""
    with tally(11, "check and status beside a run in progress") as counted:
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


def test_a_file_system_without_locks_is_refused(toy, tally):
    """flock fails with ENOSYS, as on some network file systems."""
    with tally(11, "flock is not supported") as counted:
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="no_locks")
        assert (ended.code, one_line(ended.err)) == (74, True), ended.err
        assert "cannot be locked: Function not implemented" in ended.err
        counted.add()
        shutil.rmtree(f"{out}.run", ignore_errors=True)


def test_a_window_is_tried_twice_when_the_device_is_out_of_memory(toy, tally):
    """If the device runs out of memory once, the result is the same. If it does so again, the run ends with exit code 69, and resumes."""
    with tally(16, "device out of memory: once, for good") as counted:
        out = toy.new_out()
        assert toy.run(toy.quantize(out), patch="out_of_memory_once").code == 0
        assert files_of(out) == toy.expected
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="out_of_memory_for_good")
        assert (ended.code, one_line(ended.err)) == (69, True)
        assert (
            "window 2 needs more memory than is available (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.)"
            in ended.err
        )
        counted.add(runs=2, faults=2, redone=toy.finishes(out, begun=2))


def test_a_window_whose_loss_is_not_finite_is_reverted(toy, tally):
    """One window with a loss of NaN is reverted, and its line says so. A second one ends the run with exit code 65."""
    with tally(16, "NaN in a training step") as counted:
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="nan_in_one_step")
        assert ended.code == 0
        assert ended.out.splitlines()[0].endswith("reverted: not finite")
        reasons = [report.reverted for report in Chain.read(Path(f"{out}.run")).window_reports]
        assert len(reasons) == WINDOWS
        assert reasons[0] == "not finite"
        assert "not finite" not in reasons[1:]
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="nan_in_every_step")
        assert (ended.code, one_line(ended.err)) == (65, True)
        assert "in 2 windows the loss was not finite, first in window 1" in ended.err
        out = toy.new_out()
        ended = toy.run(toy.quantize(out), patch="nan_from_the_second_window_on")
        assert (ended.code, one_line(ended.err)) == (65, True)
        assert "in 2 windows the loss was not finite, first in window 2" in ended.err
        counted.add(runs=3, faults=3)
