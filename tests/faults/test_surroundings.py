"""Rows 12, 14, 15 and 19: identity, permissions, places and times, and run directories of other versions."""

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
from cbqstream.rundir.chain import Chain, sealed
from cbqstream.rundir.identity import FORMAT, canonical, require_same
from tiny import files_of

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def half(toy):
    """A run that has one window; read only."""
    return toy.stopped(toy.new_out(), 1)


def fields(value, path=()):
    """Paths to all plain values of nested dictionaries."""
    if not isinstance(value, dict):
        return [path]
    return [found for key, item in value.items() for found in fields(item, (*path, key))]


def test_every_field_of_the_identity(half, tally):
    """Each changed alone is refused by exactly its name."""
    before = dict(Chain.read(half).run["identity"])
    with tally(12, "fields of the identity, each changed alone") as counted:
        for path in fields(before):
            after = copy.deepcopy(before)
            inner = after
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = "other"
            with pytest.raises(IdentityError) as caught:
                require_same(half, before, after)
            name = ".".join(path)
            assert f"({name}: {json.dumps(before_value(before, path))} -> " in str(caught.value)
            assert "; " not in str(caught.value)
            assert ("--allow-numerics-change" in str(caught.value)) == name.startswith("numerics.")
            counted.add()
        assert counted.counts["faults"] > 40


def before_value(value, path):
    for key in path:
        value = value[key]
    return value


def test_every_setting_is_identity_or_named_as_not(toy, half, tally):
    """A new setting that is forgotten would let two runs mix."""
    config = dict(Chain.read(half).run["config"])
    settings = Chain.read(half).run["identity"]["settings"]
    left_out = {path for path in fields(config) if path not in fields(settings)}
    with tally(12, "settings outside the identity") as counted:
        paths = {("model",), ("out",), ("run_dir",), ("calibration", "dataset")}
        expected = paths | {("device",), ("threads",), ("max_ram",), ("max_vram",)}
        assert left_out == expected
        counted.add()


def test_what_is_not_identity(toy, tally):
    """Another place for everything, and another name of the same calibration text."""
    with tally(12, "what the identity leaves out") as counted:
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


def test_other_numerics_with_leave(toy, tally):
    """Recorded, and told."""
    with tally(12, "--allow-numerics-change") as counted:
        out = toy.new_out()
        run = toy.stopped(out, 1)
        ended = toy.run(toy.quantize(out, "--threads", 2))
        assert (ended.code, one_line(ended.err)) == (78, True)
        assert "numerics.threads: 1 -> 2" in ended.err
        shutil.rmtree(run / "acts")  # made again they need not be the same
        ended = toy.run(toy.quantize(out, "--threads", 2, "--allow-numerics-change"))
        assert (ended.code, ended.windows) == (0, 2), ended.err
        status = toy.run(["status", str(run)]).out
        assert "from commit 2 on with other numerics: threads 1 -> 2" in status
        counted.add()


def test_owners_and_permissions(toy, tally):
    if os.geteuid():
        pytest.skip("only root can give files away")
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


def test_a_place_that_is_read_only(toy, tally, tmpfs):
    with tally(14, "OUT on a read-only file system") as counted:
        ended = toy.run(toy.quantize(tmpfs("ro") / "out"))
        assert (ended.code, one_line(ended.err)) == (74, True), ended.err
        assert "Read-only file system" in ended.err
        counted.add()


def test_the_result_has_ordinary_permissions(toy, tally):
    with tally(14, "umask") as counted:
        for umask in (0o000, 0o022, 0o077):
            out = toy.new_out()
            assert toy.run(toy.quantize(out), umask=umask).code == 0
            assert out.stat().st_mode & 0o777 == 0o777 & ~umask
            assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}
            assert Path(f"{out}.run").stat().st_mode & 0o777 == 0o700
            counted.add()


def test_an_output_on_another_file_system(toy, tally):
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


def test_paths_of_all_kinds(toy, tally):
    with tally(15, "paths with spaces, newlines, Unicode, 200 bytes") as counted:
        for name in ("a b", "ünïcödé", "new\nline", "-x", "[0]", "x" * 200):
            folder = toy.folder / "kinds" / name
            folder.mkdir(parents=True)
            ended = toy.run(toy.quantize(folder / "out"))
            assert ended.code == 0, ended.err
            assert files_of(folder / "out") == toy.expected
            counted.add()


def test_other_places_and_times(toy, tally):
    """Whole processes: nothing may depend on the hash seed, the time zone, the language or the folder they are started in."""
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


def test_a_clock_that_jumps(toy, tally):
    with tally(15, "a clock ten years off, and one that runs backwards") as counted:
        for patch in ("clock_far_ahead", "clock_backwards"):
            out = toy.new_out()
            assert toy.run(toy.quantize(out), patch=patch).code == 0
            assert files_of(out) == toy.expected
            counted.add()


def test_formats(toy, half, tmp_path, tally):
    """Every released format stays readable, and others are refused by name."""
    with tally(19, "run directories of other versions") as counted:
        for golden in sorted(GOLDEN.iterdir()):
            looked = toy.run(["check", str(golden)])
            assert looked.code == 0, looked.err
            assert "1 of 3 commits, an unbroken chain" in looked.out
            assert toy.run(["status", str(golden)]).code == 0
            counted.add()
        for other, age in ((FORMAT + 1, "a newer"), (FORMAT - 1, "an older")):
            run = Path(shutil.copytree(half, tmp_path / str(other)))
            content = json.loads((run / "run.json").read_text())
            content.pop("self")
            content["identity"]["format"] = other
            (run / "run.json").write_bytes(canonical(sealed(content)))
            for command in ("resume", "status", "check"):
                ended = toy.run([command, str(run)])
                assert (ended.code, one_line(ended.err)) == (78, True)
                assert f"run format {other} of {age} version, this one reads {FORMAT}" in ended.err
            counted.add()


def test_commands_that_only_read(toy, half, tally):
    """`status` and `check` leave every byte and every time as it was."""
    with tally(14, "reading commands write nothing") as counted:
        before = {str(path): path.stat().st_mtime_ns for path in half.rglob("*")}
        for command in (["status", half], ["check", half], ["check", half, "--read-data"]):
            assert toy.run([str(part) for part in command]).code == 0
            counted.add()
        assert {str(path): path.stat().st_mtime_ns for path in half.rglob("*")} == before


def test_rolling_back_step_by_step(toy, tally):
    """As far as what was carried over is kept: two windows from the end, then only to the start."""
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


def test_parts_that_are_lost_can_be_rolled_back(toy, tally):
    with tally(10, "the newest part deleted, then rolled back") as counted:
        out = toy.new_out()
        run = toy.stopped(out, 2)
        (run / "parts" / "00001" / "block-00001.safetensors").unlink()
        ended = toy.run(toy.quantize(out))
        assert (ended.code, one_line(ended.err)) == (65, True)
        assert toy.run(["rollback", str(run), "--to", "1"]).code == 0
        toy.finishes(out)
        counted.add()


def test_the_output_of_another_run_is_not_ours(toy, tally):
    """Of the same sizes."""
    with tally(17, "OUT is that of another run") as counted:
        out, other = toy.new_out(), toy.new_out()
        assert toy.run(toy.quantize(out)).code == 0
        assert toy.run(toy.quantize(other, "--max-shift", 0.1)).code == 0
        before = files_of(other)
        for name, content in toy.expected.items():  # what a run tells of itself has numbers of other lengths
            assert name in ("README.md", "metrics.jsonl") or len(before[name]) == len(content)
        ended = toy.run(toy.quantize(other, "--run-dir", f"{out}.run"))
        assert (ended.code, one_line(ended.err)) == (2, True)
        assert "is not the result of this run" in ended.err
        assert files_of(other) == before
        inside = toy.run(toy.quantize(toy.folder / "new-run" / "out", "--run-dir", toy.folder / "new-run"))
        assert (inside.code, one_line(inside.err)) == (2, True)
        assert "OUT is inside the run directory" in inside.err
        counted.add(faults=2)


def test_other_numerics_are_resumed(toy, tally):
    with tally(12, "resume after --allow-numerics-change") as counted:
        out = toy.new_out()
        run = toy.stopped(out, 1)
        ended = toy.run(toy.quantize(out, "--threads", 2, "--allow-numerics-change", "--stop-after-window", 2))
        assert ended.code == 75
        shutil.rmtree(run / "acts")  # made by both
        ended = toy.run(["resume", str(run)])
        assert (ended.code, ended.windows) == (0, 1), ended.err
        counted.add()


def test_killed_while_rolling_back(toy, tally):
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


def test_random_order_of_stops(toy, tally):
    """--stop-after-window, rollback and resume in any order end with the same bytes."""
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
