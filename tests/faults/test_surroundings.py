"""Rows 3, 5, 10, 12, 14, 15, 17 and 19: identity, permissions, paths, clocks, rollback, and run directories of other formats."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy import NIGHTLY, one_line

from cbqstream.errors import IdentityError
from cbqstream.rundir.chain import Chain
from cbqstream.rundir.identity import FORMAT, Identity, canonical, require_same
from cbqstream.rundir.records import sealed
from tiny import files_of

GOLDEN = {int(path.name.removeprefix("format-")): path for path in (Path(__file__).parent / "golden").iterdir()}
"""Stored run directories with one of three windows, by format. They are never changed. `make_golden.py` makes a new one."""


@pytest.fixture(scope="module")
def half(toy):
    """Run directory of a run with one of its three windows; read only."""
    return toy.stopped(toy.new_out(), 1)


def fields(value, path=()):
    """Paths of all values in nested dictionaries that are not dictionaries."""
    if not isinstance(value, dict):
        return [path]
    return [found for key, item in value.items() for found in fields(item, (*path, key))]


def test_a_change_of_any_field_of_the_identity_is_refused_by_name(half, tally):
    """The fields are changed one at a time. Only changed numerics may be accepted with --allow-numerics-change, and the message says so."""
    old = Chain.read(half).run.identity
    before = old.to_dict()
    with tally(12, "fields of the identity, each changed alone") as counted:
        for path in fields(before):
            after = copy.deepcopy(before)
            inner = after
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = "other"
            with pytest.raises(IdentityError) as caught:
                require_same(half, old, Identity.from_dict(after))
            name = ".".join(path)
            assert f"({name}: {json.dumps(before_value(before, path))} -> " in str(caught.value)
            assert "; " not in str(caught.value)
            assert ("--allow-numerics-change" in str(caught.value)) == name.startswith("numerics.")
            counted.add()
        assert counted.counts["faults"] > 40


def before_value(value, path):
    """The value at a path of nested dictionaries."""
    for key in path:
        value = value[key]
    return value


def test_all_settings_but_paths_and_limits_are_part_of_the_identity(toy, half, tally):
    """If a new setting were left out of the identity, a run could be resumed with another value of it."""
    run = Chain.read(half).run
    config, settings = run.config.to_dict(), dict(run.identity.settings)
    left_out = {path for path in fields(config) if path not in fields(settings)}
    with tally(12, "settings outside the identity") as counted:
        paths = {("model",), ("out",), ("run_dir",), ("calibration", "dataset")}
        expected = paths | {("device",), ("threads",), ("max_ram",), ("max_vram",)}
        assert left_out == expected
        counted.add()


def test_a_run_whose_files_have_all_moved_is_resumed(toy, tally):
    """The model, OUT, the run directory and the calibration file have other paths; their content is the same."""
    with tally(12, "paths, which are not part of the identity") as counted:
        out = toy.new_out()
        run = toy.stopped(out, 1)
        elsewhere = toy.folder / "elsewhere"
        elsewhere.mkdir()
        run.rename(elsewhere / "r")
        tokens = Path(shutil.copy(toy.tokens, elsewhere / "other name.npy"))
        model = Path(shutil.copytree(toy.model, elsewhere / "m"))
        line = toy.quantize(elsewhere / "o", "--run-dir", elsewhere / "r", "--dataset", tokens, model=model)
        ended = toy.run(line)
        assert (ended.code, ended.windows) == (0, 2), ended.err
        assert files_of(elsewhere / "o") == toy.expected
        counted.add(faults=4)
        shutil.rmtree(elsewhere)


def test_other_numerics_need_a_flag_and_are_shown_by_status(toy, tally):
    """Another number of threads is refused without --allow-numerics-change. With it, the run resumes, and `status` shows the change.

    Streams that are recomputed with other numerics need not have the committed checksums.
    """
    with tally(12, "--allow-numerics-change") as counted:
        out = toy.new_out()
        run = toy.stopped(out, 1)
        ended = toy.run(toy.quantize(out, "--threads", 2))
        assert (ended.code, one_line(ended.err)) == (78, True)
        assert "numerics.threads: 1 -> 2" in ended.err
        shutil.rmtree(run / "acts")
        ended = toy.run(toy.quantize(out, "--threads", 2, "--allow-numerics-change"))
        assert (ended.code, ended.windows) == (0, 2), ended.err
        status = toy.run(["status", str(run)]).out
        assert "numerics changed at commit 2: threads 1 -> 2" in status
        counted.add()


def test_a_run_directory_that_others_can_change_is_refused_without_a_flag(toy, tally):
    """Others may write to the folder or to a record, or another user owns it. With --allow-shared-run-dir the run resumes."""
    if os.geteuid():
        pytest.skip("only root can change the owner of a file")
    with tally(14, "run directories of others, or open to others") as counted:
        for harm in ("others write", "group writes a record", "another owner"):
            out = toy.new_out()
            run = toy.stopped(out, 1)
            if harm == "others write":
                run.chmod(0o777)
            elif harm == "group writes a record":
                (run / "run.json").chmod(0o660)
            else:
                os.chown(run / "commits", 12345, -1)
            ended = toy.run(toy.quantize(out))
            assert (ended.code, one_line(ended.err)) == (78, True)
            assert "--allow-shared-run-dir" in ended.err
            toy.finishes(out, "--allow-shared-run-dir")
            counted.add()


def test_out_on_a_read_only_file_system_is_refused(toy, tally, tmpfs):
    with tally(14, "OUT on a read-only file system") as counted:
        ended = toy.run(toy.quantize(tmpfs("ro") / "out"))
        assert (ended.code, one_line(ended.err)) == (74, True), ended.err
        assert "Read-only file system" in ended.err
        counted.add()


def test_the_result_has_the_permissions_of_the_umask(toy, tally):
    """The folder and the files of the result have the permissions of new ones. The run directory is private under any umask."""
    with tally(14, "umask") as counted:
        for umask in (0o000, 0o022, 0o077):
            out = toy.new_out()
            assert toy.run(toy.quantize(out), umask=umask).code == 0
            assert out.stat().st_mode & 0o777 == 0o777 & ~umask
            assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}
            assert Path(f"{out}.run").stat().st_mode & 0o777 == 0o700
            counted.add()


def test_out_may_be_on_another_file_system_than_the_run_directory(toy, tally):
    """Shards are then copied instead of linked."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no second file system")
    with tally(14, "OUT on another file system than RUN") as counted:
        out = Path(f"/dev/shm/cbqstream-out-{os.getpid()}")
        run = toy.new_out()
        try:
            ended = toy.run(toy.quantize(out, "--run-dir", run))
            assert ended.code == 0, ended.err
            assert files_of(out) == toy.expected
        finally:
            shutil.rmtree(out, ignore_errors=True)
        counted.add()


def test_a_path_may_have_spaces_newlines_or_unicode(toy, tally):
    """The folder that has OUT and the run directory in it has an unusual name, or a long one."""
    with tally(15, "paths with spaces, newlines, Unicode, 200 bytes") as counted:
        for name in ("a b", "ünïcödé", "new\nline", "-x", "[0]", "x" * 200):
            folder = toy.folder / "kinds" / name
            folder.mkdir(parents=True)
            ended = toy.run(toy.quantize(folder / "out"))
            assert ended.code == 0, ended.err
            assert files_of(folder / "out") == toy.expected
            counted.add()


def test_the_result_does_not_depend_on_the_environment(toy, tally):
    """Processes that are started with another hash seed, time zone, language or working directory give identical files."""
    settings = [
        {"PYTHONHASHSEED": "1", "TZ": "Pacific/Kiritimati", "LANG": "tr_TR.UTF-8", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "2", "TZ": "America/Adak", "COLUMNS": "20", "NO_COLOR": "1"},
        {"PYTHONHASHSEED": "3"},
    ]
    with tally(15, "hash seeds, time zones, languages, folders") as counted:
        for setting in settings if NIGHTLY else settings[:1]:
            out = toy.new_out()
            command = [sys.executable, "-m", "cbqstream", *toy.quantize(out)]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **setting}
            subprocess.run(command, check=True, capture_output=True, env=environment, cwd="/")
            assert files_of(out) == toy.expected
            counted.add()


def test_the_result_does_not_depend_on_the_clock(toy, tally):
    """The clock is ten years ahead, or runs backwards."""
    with tally(15, "a clock ten years off, and one that runs backwards") as counted:
        for patch in ("clock_far_ahead", "clock_backwards"):
            out = toy.new_out()
            assert toy.run(toy.quantize(out), patch=patch).code == 0
            assert files_of(out) == toy.expected
            counted.add()


def refused_by_format(toy, run, made_by, age):
    """Check that no command reads a run directory of another format, and that each names both formats."""
    for command in ("check", "status", "resume"):
        ended = toy.run([command, str(run)])
        assert (ended.code, one_line(ended.err)) == (78, True), ended.err
        assert f"run format {made_by} of {age} version, this one reads {FORMAT}" in ended.err


def test_the_current_format_is_read_and_others_are_refused(toy, half, tmp_path, tally):
    """`check` and `status` read the stored run directory of the current format.

    Stored run directories of older formats are refused by `check`, `status` and `resume`, and so is a run directory with the number of
    the next or of the previous format.
    """
    with tally(22, "run directories of other versions") as counted:
        assert max(GOLDEN) == FORMAT
        for made_by, golden in sorted(GOLDEN.items()):
            if made_by < FORMAT:
                refused_by_format(toy, golden, made_by, "an older")
            else:
                looked = toy.run(["check", str(golden)])
                assert looked.code == 0, looked.err
                assert "1 of 3 commits, an unbroken chain" in looked.out
                assert toy.run(["status", str(golden)]).code == 0
                chain = Chain.read(golden)
                chain.require_intact(*chain.expected_parts())
            counted.add()
        for other, age in ((FORMAT + 1, "a newer"), (FORMAT - 1, "an older")):
            run = Path(shutil.copytree(half, tmp_path / str(other)))
            content = json.loads((run / "run.json").read_text())
            content.pop("self")
            content["identity"]["format"] = other
            (run / "run.json").write_bytes(canonical(sealed(content)))
            refused_by_format(toy, run, other, age)
            counted.add()


def test_status_and_check_write_nothing(toy, half, tally):
    """The files of the run directory and their times of modification are the same afterwards."""
    with tally(14, "reading commands write nothing") as counted:
        before = {str(path): path.stat().st_mtime_ns for path in half.rglob("*")}
        for command in (["status", half], ["check", half], ["check", half, "--read-data"]):
            assert toy.run([str(part) for part in command]).code == 0
            counted.add()
        assert {str(path): path.stat().st_mtime_ns for path in half.rglob("*")} == before


def test_a_rollback_is_possible_while_the_window_state_is_kept(toy, tally):
    """The last of three windows can be rolled back, and all windows can. The window state after the first one is no longer kept."""
    with tally(5, "rollback from the end") as counted:
        for way in ([2], [2, 1], [0], [2, 0]):
            out = toy.new_out()
            run = Path(f"{out}.run")
            assert toy.run(toy.quantize(out)).code == 0
            shutil.rmtree(out)
            for to in way:
                ended = toy.run(["rollback", str(run), "--to", str(to)])
                refused = to == 1
                assert ended.code == (2 if refused else 0), ended.err
                assert toy.committed(out) == (2 if refused else to)
            toy.finishes(out)
            counted.add(faults=len(way))


def test_a_window_whose_shard_is_lost_can_be_rolled_back(toy, tally):
    """The run is refused while the shard is missing. After a rollback of its window the run finishes."""
    with tally(10, "the newest part deleted, then rolled back") as counted:
        out = toy.new_out()
        run = toy.stopped(out, 2)
        (run / "parts" / "00001" / "block-00001.safetensors").unlink()
        ended = toy.run(toy.quantize(out))
        assert (ended.code, one_line(ended.err)) == (65, True)
        assert toy.run(["rollback", str(run), "--to", "1"]).code == 0
        toy.finishes(out)
        counted.add()


def test_out_that_is_the_result_of_another_run_is_refused(toy, tally):
    """OUT has files of the same sizes, but of a run with other settings. An OUT inside the run directory is refused, too."""
    with tally(17, "OUT is that of another run") as counted:
        out, other = toy.new_out(), toy.new_out()
        assert toy.run(toy.quantize(out)).code == 0
        assert toy.run(toy.quantize(other, "--max-shift", 0.1)).code == 0
        before = files_of(other)
        for name, content in toy.expected.items():  # these two files show numbers that may be longer or shorter
            assert name in ("README.md", "metrics.jsonl") or len(before[name]) == len(content)
        ended = toy.run(toy.quantize(other, "--run-dir", f"{out}.run"))
        assert (ended.code, one_line(ended.err)) == (2, True)
        assert "is not the result of this run" in ended.err
        assert files_of(other) == before
        inside = toy.run(toy.quantize(toy.folder / "new-run" / "out", "--run-dir", toy.folder / "new-run"))
        assert (inside.code, one_line(inside.err)) == (2, True)
        assert "OUT is inside the run directory" in inside.err
        counted.add(faults=2)


def test_resume_takes_the_threads_of_the_newest_window(toy, tally):
    """A run continued with other numerics resumes with these, also when its streams were lost, which are then recomputed."""
    with tally(12, "resume after --allow-numerics-change") as counted:
        out = toy.new_out()
        run = toy.stopped(out, 1)
        ended = toy.run(toy.quantize(out, "--threads", 2, "--allow-numerics-change", "--stop-after-window", 2))
        assert ended.code == 75
        shutil.rmtree(run / "acts")
        ended = toy.run(["resume", str(run)])
        assert (ended.code, ended.windows) == (0, 1), ended.err
        counted.add()


def test_a_rollback_or_clean_that_is_killed_leaves_a_run_that_finishes(toy, tally):
    """SIGKILL comes before a durable operation of `rollback` or of `clean --unfinished`."""
    with tally(3, "SIGKILL before an operation of rollback and clean") as counted:
        for to in (0, 1):
            for at in range(1, 100):
                out = toy.new_out()
                run = toy.stopped(out, 2)
                ended = toy.run(["rollback", str(run), "--to", str(to)], at=at, kind="kill")
                if ended.code == 0:
                    break
                toy.finishes(out)
                counted.add()
                if not NIGHTLY and at > 3:
                    break
        for at in range(1, 100 if NIGHTLY else 4):
            out = toy.new_out()
            run = toy.stopped(out, 1)
            ended = toy.run(["clean", str(run), "--unfinished"], at=at, kind="kill")
            if ended.code == 0:
                assert not run.exists()
                break
            counted.add()
            toy.finishes(out)


def test_stops_and_rollbacks_in_random_order_do_not_change_the_result(toy, tally):
    """A run is stopped after a window or rolled back four times, and then finishes with identical files."""
    chance = random.Random(15)
    with tally(5, "stops and rollbacks in random order") as counted:
        for _ in range(20 if NIGHTLY else 2):
            out = toy.new_out()
            for _ in range(4):
                done = toy.committed(out)
                if done and chance.random() < 0.5:
                    ended = toy.run(["rollback", f"{out}.run", "--to", str(chance.choice((0, done - 1)))])
                    assert ended.code == 0, ended.err
                else:
                    assert (
                        toy.run(toy.quantize(out, "--stop-after-window", chance.randrange(max(1, done), 3))).code == 75
                    )
                counted.add()
            toy.finishes(out)
