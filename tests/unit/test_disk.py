"""Durable file operations: their results, and their errors when the operating system refuses them."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from cbqstream import disk as disk_module
from cbqstream.disk import Disk
from cbqstream.errors import StorageError


def test_write_returns_the_digest_of_the_file_content(tmp_path):
    digest = Disk().write(tmp_path / "f", [b"abc", b"", b"def"])
    assert (tmp_path / "f").read_bytes() == b"abcdef"
    assert (digest.size, digest.sha256) == (6, hashlib.sha256(b"abcdef").hexdigest())
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_write_and_rename_do_not_overwrite_a_file(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(StorageError, match="File exists"):
        Disk().write(tmp_path / "f", [b"new"])
    (tmp_path / "g").write_text("other")
    with pytest.raises(StorageError, match="rename failed"):
        Disk().rename(tmp_path / "g", tmp_path / "f")
    assert (tmp_path / "f").read_text() == "old"


def test_write_does_not_follow_a_symbolic_link(tmp_path):
    (tmp_path / "f").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        Disk().write(tmp_path / "f", [b"x"])
    assert not (tmp_path / "elsewhere").exists()


def test_full_disk_raises_a_storage_error_that_says_what_to_do(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_module.os, "fsync", full)
    with pytest.raises(StorageError, match=r"sync_file failed: No space left on device\. Free some space") as caught:
        Disk().write(tmp_path / "f", [b"x"])
    assert caught.value.exit_code == 74


CODE = """
import resource, sys
from pathlib import Path
from cbqstream.disk import Disk
from cbqstream.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    Disk().write(Path(sys.argv[1]), [bytes(999), b"abc"])
except StorageError as error:
    print(error, error.exit_code, error.full)
"""


def test_a_file_that_may_not_grow_is_named_with_the_limit(tmp_path):
    """The second chunk does not fit, and would be in the buffer of a file with one."""
    path = tmp_path / "f"
    ended = subprocess.run([sys.executable, "-c", CODE, path], capture_output=True, text=True, check=True)
    remedy = "A file may have 1,000 bytes (ulimit -f). Raise the limit and run the same command again."
    assert ended.stdout == f"{path}: write failed: File too large. {remedy} 74 False\n"


def test_a_file_that_the_file_system_cannot_hold_is_an_error_without_a_limit(tmp_path, monkeypatch):
    def too_large(handle, content):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(disk_module.os, "write", too_large)
    with pytest.raises(StorageError, match=r"The file system takes no file of this size\. Use another one\.$"):
        Disk().write(tmp_path / "f", [b"x"])


def test_write_continues_after_a_part_of_a_chunk(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(disk_module.os, "write", lambda handle, content: write(handle, content[:2]))
    assert Disk().write(tmp_path / "f", [b"abcde", b"f"]).size == 6
    assert (tmp_path / "f").read_bytes() == b"abcdef"


@pytest.mark.parametrize("why", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path, monkeypatch, why):
    def refuse(*_):
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(disk_module.os, "open", refuse)
    with pytest.raises(StorageError, match=r"Make the folder writable, or give another place\.$"):
        Disk().write(tmp_path / "f", [b"x"])


def test_scratch_file_has_no_name_and_returns_what_was_written(tmp_path):
    with Disk().scratch(tmp_path / "s") as file:
        assert not list(tmp_path.iterdir())
        first, second = file.append(b"abcdef"), file.append(b"gh")
        file.write(first + 2, b"XY")
        for start, size, expected in ((first, 6, b"abXYef"), (second, 2, b"gh"), (second + 1, 1, b"h")):
            piece = bytearray(size)
            file.read(start, piece)
            assert piece == expected
        with pytest.raises(StorageError, match="read failed: Input/output error"):
            file.read(second, bytearray(3))


def test_scratch_file_on_a_full_disk_raises_a_storage_error(tmp_path, monkeypatch):
    """The operating system writes three bytes at a time, and refuses the third write."""
    written = []

    def write_three_bytes_twice(handle, content, start):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append((start, bytes(content[:3])))
        return 3

    monkeypatch.setattr(disk_module.os, "pwrite", write_three_bytes_twice)
    with Disk().scratch(tmp_path / "s") as file, pytest.raises(StorageError, match="No space left on device") as caught:
        file.append(b"abcdefgh")
    assert written == [(0, b"abc"), (3, b"def")]
    assert caught.value.full


def test_publish_replaces_an_empty_folder_and_refuses_a_folder_with_files(tmp_path):
    for name in ("source", "empty", "full"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "source" / "f").write_text("x")
    (tmp_path / "full" / "mine").write_text("y")
    with pytest.raises(StorageError):
        Disk().publish(tmp_path / "source", tmp_path / "full")
    Disk().publish(tmp_path / "source", tmp_path / "empty")
    assert (tmp_path / "empty" / "f").read_text() == "x"
    assert (tmp_path / "full" / "mine").read_text() == "y"


@pytest.mark.parametrize("why", [errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.EMLINK])
def test_link_or_copy_copies_where_hard_links_are_not_possible(tmp_path, monkeypatch, why):
    (tmp_path / "f").write_bytes(b"content")
    Disk().link_or_copy(tmp_path / "f", tmp_path / "linked")
    assert (tmp_path / "linked").samefile(tmp_path / "f")

    def other_file_system(source, target):
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(disk_module.os, "link", other_file_system)
    Disk().link_or_copy(tmp_path / "f", tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == b"content"
    assert not (tmp_path / "copied").samefile(tmp_path / "f")


def test_operations_are_reported_with_their_number_before_they_happen(tmp_path):
    seen = []
    disk = Disk(lambda number, name, path: seen.append((number, name, path.exists())))
    disk.make_folder(tmp_path / "d")
    disk.write(tmp_path / "d" / "f", [b""])
    disk.sync_folders(tmp_path / "d")
    disk.remove_tree(tmp_path / "d")
    assert seen == [
        (1, "make_folder", False),
        (2, "write", False),
        (3, "sync_file", True),
        (4, "sync_folder", True),
        (5, "remove_tree", True),
    ]


def test_a_scratch_file_is_read_after_it_was_synced_and_dropped_from_the_page_cache(tmp_path, monkeypatch):
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *rest: dropped.append(rest))
    with Disk().scratch(tmp_path / "f") as file:
        start = file.append(b"abc")
        file.sync()
        file.drop_cache()
        found = bytearray(3)
        file.read(start, found)
    assert found == b"abc"
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)]


def test_a_system_that_cannot_drop_its_page_cache_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    with Disk().scratch(tmp_path / "f") as file, pytest.raises(StorageError, match="the page cache cannot be dropped"):
        file.drop_cache()
