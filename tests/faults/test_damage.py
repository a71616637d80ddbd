"""Rows 8 to 10, 13 and 18: files that were changed, truncated, swapped, replaced or deleted while no process ran."""

import itertools
import os
import random
import shutil
from pathlib import Path

import pytest
from toy import NIGHTLY, WINDOWS, one_line

from cbqstream.checkpoint.folder import find_tensors
from cbqstream.commands.check import check
from cbqstream.errors import CbqstreamError, IdentityError, InputError
from cbqstream.rundir.chain import WINDOW_STATE, Chain
from tiny import files_of

OLD_STATE = f"parts/00000/{WINDOW_STATE}"
"""Window state of the first window. After the second window it is kept for a rollback only, and nothing reads it."""


@pytest.fixture(scope="module")
def half(toy):
    """Run directory of a run with two of its three windows, to be copied."""
    return toy.stopped(toy.new_out(), 2)


@pytest.fixture
def copy(toy, half):
    """A function that copies this run directory for a new OUT, and returns the OUT."""

    def make() -> Path:
        out = toy.new_out()
        shutil.copytree(half, f"{out}.run", symlinks=True)
        return out

    return make


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_a_record_is_refused_or_changes_nothing(half, tmp_path, tally):
    """Bits of run.json and of the commits are flipped. The records are refused, or their parsed content is the same as before."""
    chance, before = random.Random(8), Chain.read(half)
    with tally(8, "bit flips in run.json and the commits") as counted:
        shutil.copytree(half, tmp_path / "run")
        for name in ("run.json", "commits/00000", "commits/00001"):
            file = tmp_path / "run" / name
            good = file.read_bytes()
            for byte in range(0, len(good), 1 if NIGHTLY else 37):
                flip(file, 8 * byte + chance.randrange(8))
                counted.add()
                try:
                    after = Chain.read(tmp_path / "run")
                except (InputError, IdentityError):
                    after = before
                assert (after.run, after.commits) == (before.run, before.commits), f"{name}, byte {byte}"
                file.write_bytes(good)


def test_a_flipped_bit_in_parts_is_refused_and_in_streams_repaired(toy, copy, tally):
    """`check` and the run refuse a damaged file of parts/, and no result is written. Damaged streams are recomputed."""
    chance = random.Random(9)
    with tally(8, "bit flips in parts and streams") as counted:
        for number in range(120 if NIGHTLY else 6):
            out = copy()
            run = Path(f"{out}.run")
            kind = ("parts", "acts")[number % 2]
            files = sorted(path for path in (run / kind).rglob("*") if path.is_file())
            file = chance.choice([path for path in files if path != run / OLD_STATE])
            flip(file, chance.randrange(8 * file.stat().st_size))
            counted.add()
            if kind == "acts":
                toy.finishes(out)
                continue
            looked = toy.run(["check", str(run), "--read-data"])
            assert (looked.code, one_line(looked.err)) == (65, True), looked.err
            assert str(file) in looked.err
            ended = toy.run(toy.quantize(out))
            assert ended.code == 65, (file, ended.err)
            assert not out.exists()


def test_a_flipped_bit_in_the_source_is_found_by_check(toy, tally):
    """A flipped bit in the data of a tensor that the run has read is found. One in a header is found, or it is harmless."""
    chance = random.Random(10)
    with tally(8, "bit flips in the source") as counted:
        out = toy.new_out()
        model = Path(shutil.copytree(toy.model, toy.folder / "flipped"))
        assert toy.run(toy.quantize(out, "--stop-after-window", 2, model=model)).code == 75
        infos, read = find_tensors(model), sorted(Chain.read(Path(f"{out}.run")).source_digests)
        for _ in range(300 if NIGHTLY else 25):
            tensor = infos[chance.choice(read)]
            shard, good = tensor.file, tensor.file.read_bytes()
            in_header = chance.random() < 0.5
            header = (0, 8 + int.from_bytes(good[:8], "little"))
            flip(
                shard,
                8 * chance.randrange(*(header if in_header else (tensor.start, tensor.end))) + chance.randrange(8),
            )
            counted.add()
            found = problems(Path(f"{out}.run"))
            shard.write_bytes(good)
            if not in_header:
                assert f'tensor "{tensor.name}" is not what this run read before' in found[0]
                assert found[1:] in (
                    [],
                    [f"{model}: the weights changed since this run began. Restore them."],
                )
            assert all("\n" not in line for line in found)
        assert not problems(Path(f"{out}.run"))
        assert len(read) >= 29
        shutil.rmtree(model)


def problems(run: Path) -> list[str]:
    """Problems that `check --read-data` finds, or the error that it raises."""
    try:
        return check(run, read_data=True).problems
    except CbqstreamError as error:
        return [str(error)]


SHAPES = {
    "truncated to 0 bytes": lambda path: os.truncate(path, 0),
    "truncated to 1 byte": lambda path: os.truncate(path, 1),
    "truncated to 7 bytes": lambda path: os.truncate(path, 7),
    "truncated to 8 bytes": lambda path: os.truncate(path, 8),
    "truncated to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "truncated by 1 byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer by 1 byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "replaced by a folder": lambda path: (path.unlink(), path.mkdir()),
    "replaced by a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "replaced by a link": lambda path: (path.rename(path.with_name("away")), path.symlink_to(path.with_name("away"))),
    "replaced by a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "deleted": lambda path: path.unlink(),
}
"""Kinds of damage to a file, and a function that does it."""


def test_a_truncated_replaced_or_deleted_file_is_refused_unless_it_is_a_stream(toy, half, copy, tally):
    """A damaged record or part is refused at once with exit code 65. Damaged streams are recomputed.

    If the last record is deleted, the chain of commits ends earlier, and its window is quantized again.
    """
    files = [str(path.relative_to(half)) for path in sorted(half.rglob("*")) if path.is_file()]
    names = [name for name in files if name not in ("LOCK", OLD_STATE)]
    cases = list(itertools.product(SHAPES, names))
    random.Random(11).shuffle(cases)
    with tally(
        9, "files truncated, grown, replaced by a folder, pipe, link or device; each file deleted (row 10)"
    ) as counted:
        for shape, name in cases if NIGHTLY else cases[:14]:
            out = copy()
            SHAPES[shape](Path(f"{out}.run") / name)
            counted.add()
            ended = toy.run(toy.quantize(out, "--stop-after-window", 2))
            assert ended.seconds < 4, (shape, name)
            if name.startswith("acts/"):
                assert ended.code == 75, (shape, name, ended.err)
                toy.finishes(out)
                continue
            last_record = (shape, name) == ("deleted", "commits/00001")
            if last_record:
                assert ended.code == 75, ended.err
                toy.finishes(out)
            else:
                assert ended.code == 65, (shape, name, ended.err)
                assert one_line(ended.err), ended.err
                assert f"{out}.run" in ended.err


def test_two_deleted_files_are_refused_if_the_run_needs_one_of_them(toy, half, copy, tally):
    """The run is refused with exit code 65 if one of two deleted files is needed, and finishes otherwise.

    A run whose last commits were deleted needs the parts of the windows that are left, and the window state after them. Streams are not
    needed, because they are recomputed.
    """
    first, last = "commits/00000", "commits/00001"
    files = [str(path.relative_to(half)) for path in sorted(half.rglob("*")) if path.is_file() and path.name != "LOCK"]
    cases = list(itertools.combinations(files, 2))
    random.Random(12).shuffle(cases)
    with tally(10, "two files deleted, all pairs") as counted:
        for case in cases if NIGHTLY else cases[:8]:
            out = copy()
            for name in case:
                (Path(f"{out}.run") / name).unlink()
            counted.add(faults=2)
            left = {first, last} - {*case}
            needed = {"run.json"} | {name for name in files if name.startswith("parts/") and name != OLD_STATE}
            if left == {first}:  # one window is left, and its window state is needed
                needed = {name for name in needed if not name.startswith("parts/00001")} | {OLD_STATE}
            elif left == {last}:
                needed = {first}
            elif not left:
                needed = {"run.json"}
            ended = toy.run(toy.quantize(out))
            if needed & {*case}:
                assert (ended.code, one_line(ended.err)) == (65, True), (case, ended.err)
                assert not out.exists()
            else:
                assert ended.code == 0, (case, ended.err)
                assert files_of(out) == toy.expected


def test_streams_with_swapped_chunks_or_chunks_of_another_run_are_recomputed(toy, half, copy, tally):
    """Two chunks of a stream are swapped, or one is replaced by the chunk of an earlier window of another run."""
    with tally(9, "chunks swapped, or of another run") as counted:
        for name in ("quantized", "reference"):
            out = copy()
            acts = Path(f"{out}.run") / "acts" / "00002" / name
            (acts / "c.0.0.0").rename(acts / "aside")
            (acts / "c.1.0.0").rename(acts / "c.0.0.0")
            (acts / "aside").rename(acts / "c.1.0.0")
            toy.finishes(out)
            counted.add()
        out = copy()
        other = toy.stopped(toy.new_out(), 1)
        shutil.copy(
            other / "acts" / "00001" / "quantized" / "c.0.0.0", Path(f"{out}.run") / "acts/00002/quantized/c.0.0.0"
        )
        toy.finishes(out)
        counted.add()


def test_a_commit_of_another_run_is_refused(toy, copy, tally):
    """The second commit is replaced by that of a run with another seed, which names another record before it."""
    with tally(9, "a commit of another run") as counted:
        out = copy()
        other = toy.new_out()
        assert toy.run(toy.quantize(other, "--seed", 3, "--stop-after-window", 2)).code == 75
        shutil.copy(f"{other}.run/commits/00001", f"{out}.run/commits/00001")
        ended = toy.run(toy.quantize(out))
        assert (ended.code, one_line(ended.err)) == (65, True)
        assert "commits/00001: checksum or place in the chain does not match" in ended.err
        counted.add()


def test_deleted_streams_are_recomputed_with_the_committed_checksums(toy, tally):
    """The streams are deleted after the first and after the second window. The recomputed files are identical."""
    with tally(18, "streams deleted, recomputed with the committed checksums") as counted:
        for windows in (1, 2):
            out = toy.new_out()
            run = toy.stopped(out, windows)
            before = files_of(run / "acts")
            shutil.rmtree(run / "acts")
            assert toy.run(toy.quantize(out, "--stop-after-window", windows)).code == 75
            assert files_of(run / "acts") == before
            toy.finishes(out)
            counted.add()


def test_a_run_whose_source_has_changed_is_not_resumed(toy, tally):
    """Shards of the source are changed, swapped, truncated or removed. Only another inode and another time are accepted."""
    with tally(13, "the source: touched, changed, swapped, truncated, removed") as counted:
        for case in ("touched", "changed", "swapped", "truncated", "removed"):
            out = toy.new_out()
            model = Path(shutil.copytree(toy.model, toy.folder / case))
            assert toy.run(toy.quantize(out, "--stop-after-window", 1, model=model)).code == 75
            one, two = sorted(model.glob("*.safetensors"))[:2]
            if case == "touched":
                shutil.copy(one, model / "aside")
                (model / "aside").rename(one)
                os.utime(one, (0, 0))
            elif case == "changed":
                flip(one, 8 * (one.stat().st_size - 3))
            elif case == "swapped":
                one.rename(model / "aside")
                two.rename(one)
                (model / "aside").rename(two)
            elif case == "truncated":
                os.truncate(one, one.stat().st_size - 8)
            else:
                one.unlink()
            ended = toy.run(toy.quantize(out, model=model))
            assert ended.code == {"touched": 0, "changed": 78}.get(case, 65), (case, ended.err)
            if case == "touched":
                assert ended.windows == WINDOWS - 1
                assert files_of(out) == toy.expected
            else:
                assert one_line(ended.err)
            counted.add()


def test_a_source_that_changes_while_it_is_copied_gives_no_result(toy, tally):
    """A tensor that is copied into the result is hashed on the way, so a change is found at its end. OUT must then not exist."""
    with tally(13, "the source changes while it is copied") as counted:
        out = toy.new_out()
        model = Path(shutil.copytree(toy.model, toy.folder / "changing"))
        ended = toy.run(toy.quantize(out, model=model), patch="source_changes_before_the_export")
        assert (ended.code, one_line(ended.err)) == (78, True), ended.err
        assert 'tensor "lm_head.weight" is not what this run read before. Restore the file.' in ended.err
        assert not out.exists()
        shutil.rmtree(model)
        shutil.copytree(toy.model, model)
        assert toy.run(toy.quantize(out, model=model)).code == 0
        assert files_of(out) == toy.expected
        counted.add()
