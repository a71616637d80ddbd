"""Reading of safetensors checkpoints: dtypes, shards, indexes, reading ahead, and broken files."""

import contextlib
import json
import os
import resource
import struct
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cbqstream.checkpoint import reader
from cbqstream.checkpoint.folder import find_tensors
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.verified import VerifiedCheckpoint
from cbqstream.disk import Disk
from cbqstream.errors import InputError
from cbqstream.packed.shard import copy_tensors

CPU = torch.device("cpu")


def accept(path):
    """Read a header, which must succeed or raise an `InputError` with a message of one line."""
    with contextlib.suppress(InputError):
        try:
            read_header(path)
        except InputError as error:
            if "\n" in str(error):
                raise AssertionError(str(error)) from error
            raise


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(dtype="F32", shape=(2,), offsets=(0, 8), name="a"):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def test_tensors_of_different_dtypes_are_read_from_several_shards(tmp_path):
    shards = {
        "a.safetensors": {"x": torch.randn(3, 4).bfloat16(), "y": torch.randn(5)},
        "b.safetensors": {"z": torch.randn(2, 2, 2).half(), "n": torch.tensor([[1, 2]])},
    }
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    for tensors in shards.values():
        for name, value in tensors.items():
            read = checkpoint.read(name, device=CPU)
            assert read.dtype == value.dtype
            assert torch.equal(read, value)
            assert torch.equal(checkpoint.read(name, device=CPU, dtype=torch.float32), value.float())
            assert (
                b"".join(checkpoint.raw(checkpoint.infos[name])) == value.flatten().view(torch.uint8).numpy().tobytes()
            )
            assert checkpoint.tensors()[name] == tuple(value.shape)


def test_single_file_checkpoint_needs_no_index(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    assert list(find_tensors(tmp_path)) == ["x"]


COPIED = {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "C64": 64,
}
"""Bits of a value of each dtype that is copied and not read."""


@pytest.mark.parametrize("dtype", COPIED)
def test_tensors_of_other_dtypes_are_copied_byte_for_byte_and_not_read(tmp_path, dtype):
    content = bytes(range(COPIED[dtype]))  # 8 values
    raw(tmp_path / "model.safetensors", one(dtype, (2, 4), (0, len(content))), content)
    checkpoint = Checkpoint.open(tmp_path)
    copy_tensors(Disk(), tmp_path / "copy.safetensors", checkpoint, checkpoint.infos)
    copy = Checkpoint(read_header(tmp_path / "copy.safetensors"))
    for source in (checkpoint, copy):
        assert source.infos["a"].stored_dtype == dtype
        assert source.tensors() == {"a": (2, 4)}
        assert b"".join(source.raw(source.infos["a"])) == content
    assert copy.fingerprint() == checkpoint.fingerprint()
    problem = rf'model\.safetensors: tensor "a": has dtype {dtype}, which is copied but not computed with\. Convert it to bf16'
    for refused in (lambda: checkpoint.read("a", device=CPU), lambda: checkpoint.infos["a"].dtype):
        with pytest.raises(InputError, match=problem):
            refused()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_are_read(tmp_path, dtype):
    values = torch.tensor([0, 65535], dtype=dtype)
    save_file({"a": values}, tmp_path / "model.safetensors")
    source = VerifiedCheckpoint.open(tmp_path)
    assert torch.equal(source.read("a", device=CPU), values)
    assert source.read("a", device=CPU, dtype=torch.int64).tolist() == [0, 65535]
    assert list(source.take_digests()) == ["a"]


def test_reading_all_tensors_one_by_one_does_not_keep_the_file_in_memory(tmp_path):
    """Files are neither mapped nor read as a whole, so resident memory grows by the size of a tensor, not of a shard."""
    save_file({f"t{index}": torch.zeros(1 << 20) for index in range(64)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(64):
        checkpoint.read(f"t{index}", device=CPU)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 << 10  # KiB; the file is 256 MiB


def test_header_of_640_bytes_is_not_mistaken_for_a_pickle(tmp_path):
    """A file whose header has 640 bytes starts with the bytes 80 02, as a pickle does."""
    text = json.dumps(one()).encode()
    path = raw(tmp_path / "model.safetensors", text + b" " * (640 - len(text)), bytes(8))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read_header(path)) == ["a"]


def test_file_that_is_truncated_after_opening_raises_an_input_error(tmp_path):
    save_file({"x": torch.ones(1 << 16)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError):
        checkpoint.read("x", device=CPU)


FILES = {
    "empty": (b"", "empty file"),
    "too short": (b"1234567", "too short"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
    "html": (b"<!DOCTYPE html><html>", "HTML page"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickle checkpoint"),
    "pickle": (b"\x80\x02}q\x00.........", "pickle checkpoint"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "huge header": (struct.pack("<Q", 1 << 40) + b"{}", "exceeds the 100,000,000 limit"),
    "header past the end": (struct.pack("<Q", 1000) + b"{}", "header is 1000 bytes long, file has 10"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_not_safetensors_are_refused(tmp_path, case):
    content, message = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_header(path)


HEADERS = {
    "not JSON": (b"{nonsense", b"", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not JSON"),
    "a list": (b"[]", b"", "not a JSON object"),
    "deeply nested": (b"[" * 200_000, b"", "not JSON"),
    "same name twice": (
        b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {}}',
        bytes(4),
        '"a" appears twice',
    ),
    "unknown dtype": (one(dtype="F99"), bytes(8), "F99 is not known"),
    "half a byte": (one(dtype="F4", shape=(3,), offsets=(0, 2)), bytes(2), "not plausible"),
    "negative offset": (one(offsets=(-8, 0)), bytes(8), "not valid"),
    "reversed offsets": (one(offsets=(8, 0)), bytes(8), "not valid"),
    "unused bytes": (one(offsets=(4, 12)), bytes(12), "hole"),
    "shape and offsets disagree": (one(shape=(3,)), bytes(8), r"shape \[3\] F32 needs 12 bytes, header gives 8"),
    "product of sizes overflows": (one(shape=(1 << 30, 1 << 30)), bytes(8), "not plausible"),
    "huge size in an empty tensor": (one(shape=(0, 1 << 40), offsets=(0, 0)), b"", "not plausible"),
    "boolean as a size": (one(shape=(True,)), bytes(8), "not plausible"),
    "bytes after the data": (one(), bytes(9), "header describes"),
    "truncated data": (one(), bytes(7), "header describes"),
    "name with a slash": (one(name="../x"), bytes(8), "a path, too long or not printable"),
    "name with NUL": (one(name="a\0b"), bytes(8), "a path, too long or not printable"),
    "entry is a number": ({"a": 3}, b"", "not an object"),
    "metadata is not text": ({"__metadata__": {"a": 1}}, b"", "metadata of the header is not text"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_inconsistent_headers_are_refused(tmp_path, case):
    header, data, message = HEADERS[case]
    with pytest.raises(InputError, match=message):
        read_header(raw(tmp_path / "model.safetensors", header, data))


@given(st.binary(max_size=300))
def test_random_bytes_give_a_header_or_an_input_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(content)
    accept(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
        ),
    )
)
def test_random_json_gives_a_header_or_an_input_error(tmp_path_factory, header):
    path = raw(tmp_path_factory.mktemp("fuzz") / "model.safetensors", header, bytes(8))
    accept(path)


INDEXES = {
    "parent folder": ({"weight_map": {"x": "../x.safetensors"}}, "leaves the model folder"),
    "absolute path": ({"weight_map": {"x": "/etc/passwd"}}, "leaves the model folder"),
    "backslash": ({"weight_map": {"x": "a\\b"}}, "is not valid"),
    "not a string": ({"weight_map": {"x": 3}}, "is not valid"),
    "list": ({"weight_map": {"x": ["a.safetensors"]}}, "is not valid"),
    "no weight map": ({}, "no weight_map"),
    "missing shard": ({"weight_map": {"x": "b.safetensors", "y": "b.safetensors"}}, r"missing \(2 tensors\)"),
    "tensor that no shard has": (
        {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}},
        r'a\.safetensors: tensor "y": is in no shard',
    ),
    "tensor that the index does not list": (
        {"weight_map": {"y": "b/c.safetensors"}},
        r'c\.safetensors: tensor "x": is in',
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_broken_indexes_are_refused(tmp_path, case):
    index, message = INDEXES[case]
    save_file({"x": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "b").mkdir()
    save_file({"x": torch.ones(3), "y": torch.ones(3)}, tmp_path / "b" / "c.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        find_tensors(tmp_path)


def test_folders_without_safetensors_are_refused(tmp_path):
    with pytest.raises(InputError, match="no safetensors"):
        find_tensors(tmp_path)
    np.save(tmp_path / "x.npy", np.ones(2))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="pickle"):
        find_tensors(tmp_path)


def test_several_shards_without_an_index_are_refused(tmp_path):
    for name in "ab":
        save_file({name: torch.ones(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"2 shards but no model\.safetensors\.index\.json"):
        find_tensors(tmp_path)


def test_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("present", [True, False])
def test_reading_ahead_reads_all_tensors_and_ignores_a_missing_file(tmp_path, present, monkeypatch):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint, seen = Checkpoint.open(tmp_path), []
    pieces, done = reader._pieces, threading.Event()

    def watched(info):
        for piece in pieces(info):
            seen.append((info.name, len(piece)))
            yield piece
        if info.name == "b":
            done.set()

    monkeypatch.setattr(reader, "_pieces", watched)
    if not present:
        (tmp_path / "model.safetensors").unlink()
    with checkpoint.reading_ahead(["a", "b"]):
        assert done.wait(20 if present else 0.2) == present
    assert seen == ([("a", 8), ("b", 12)] if present else [])
    assert not [thread for thread in threading.enumerate() if thread.name == "weights-ahead"]


def test_reading_ahead_stops_at_the_end_of_the_with_statement(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    given = []

    def endless(info):
        while True:
            given.append(info)
            yield b"piece"

    monkeypatch.setattr(reader, "_pieces", endless)
    with Checkpoint.open(tmp_path).reading_ahead(["a"]):
        pass
    left = len(given)
    time.sleep(0.05)
    assert len(given) == left
