"""Tests that every activation store must pass, and tests of the Zarr store."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from cbqstream import disk as disk_module
from cbqstream.activations.memory_store import MemoryStore
from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import ActivationStore, StreamShape
from cbqstream.activations.write_behind import write_behind
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.disk import Disk
from cbqstream.errors import InputError, StorageError

SHAPE = StreamShape(num_segments=5, seq_len=6, hidden_size=8)


class ActivationStoreContract:
    """Tests of the interface `ActivationStore`. A subclass tests the store that its method `make` returns."""

    def make(self, tmp_path, shape: StreamShape) -> ActivationStore:
        raise AssertionError("subclasses make a store")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_segments_are_read_back_bit_for_bit(self, tmp_path, dtype):
        store = self.make(tmp_path, StreamShape(2, 256, 256, dtype))
        if dtype.itemsize == 2:  # all bit patterns, with NaN and infinity
            x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).view(256, 256)
        else:
            x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
            x[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
        store.write(1, x)
        found = store.read(1)
        assert found.dtype == dtype
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        assert torch.equal(found.view(bits), x.view(bits))

    def test_segments_are_converted_to_the_dtype_of_the_store(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        x = torch.full((6, 8), 1.0039)
        store.write(0, x)
        assert torch.equal(store.read(0), x.to(torch.bfloat16))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("kind", ["transposed", "a column", "expanded"])
    def test_segments_with_other_strides_are_stored_as_they_are(self, tmp_path, kind, dtype):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        x = {"transposed": x[:, 0].clone().view(1, 8).T, "a column": x[:, ::6], "expanded": x[0, :1].expand(1, 8).T}[
            kind
        ]
        store, x = self.make(tmp_path, StreamShape(1, 8, 1, dtype)), x.to(dtype)
        store.write(0, x)
        assert torch.equal(store.read(0), x)

    def test_a_segment_of_zeros_is_not_a_missing_segment(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        store.write(2, torch.zeros(6, 8))
        assert not store.read(2).any()

    def test_reading_a_segment_that_was_not_written_is_an_error(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        store.write(0, torch.ones(6, 8))
        with pytest.raises(InputError, match="segment 1"):
            store.read(1)

    def test_a_segment_can_be_overwritten(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        store.write(3, torch.ones(6, 8))
        store.write(3, torch.full((6, 8), 2.0))
        assert (store.read(3) == 2).all()

    def test_written_and_read_tensors_do_not_share_memory_with_the_store(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        x = torch.ones(6, 8, dtype=torch.bfloat16)
        store.write(0, x)
        x += 1
        store.read(0).add_(5)
        assert (store.read(0) == 1).all()

    @pytest.mark.parametrize("segment", [-1, 5])
    def test_segment_numbers_outside_the_stream_are_an_error(self, tmp_path, segment):
        store = self.make(tmp_path, SHAPE)
        with pytest.raises(IndexError):
            store.read(segment)
        with pytest.raises(IndexError):
            store.write(segment, torch.ones(6, 8))

    def test_a_segment_of_another_shape_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="expected"):
            self.make(tmp_path, SHAPE).write(0, torch.ones(8, 6))

    def test_read_batches_gives_the_batches_of_all_stores_in_order(self, tmp_path):
        first, second = (self.make(tmp_path / name, SHAPE) for name in ("a", "b"))
        for segment in range(5):
            first.write(segment, torch.full((6, 8), float(segment)))
            second.write(segment, torch.full((6, 8), float(10 * segment)))
        batches = in_batches([4, 2, 0, 1, 3], 2)
        read = list(read_batches([first, second], batches, torch.device("cpu")))
        assert [x[:, 0, 0].tolist() for x, _ in read] == [[4, 2], [0, 1], [3]]
        assert [y[:, 0, 0].tolist() for _, y in read] == [[40, 20], [0, 10], [30]]

    def test_read_batches_raises_an_error_at_the_batch_with_the_missing_segment(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        store.write(0, torch.ones(6, 8))
        reader = read_batches([store], [[0], [1]], torch.device("cpu"))
        assert next(reader)[0].shape == (1, 6, 8)
        with pytest.raises(InputError):
            next(reader)

    def test_write_behind_writes_everything_in_order_before_it_ends(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        with write_behind(store) as write:
            for value, segment in enumerate([4, 2, 4, 0, 1, 3, 2, 2, 4]):
                write(segment, torch.full((6, 8), float(value)))
        assert [store.read(segment)[0, 0].item() for segment in range(5)] == [3, 4, 7, 5, 8]

    def test_write_behind_raises_the_error_of_a_write_and_writes_nothing_after_it(self, tmp_path):
        store = self.make(tmp_path, SHAPE)

        def fill():
            with write_behind(store) as write:
                for segment in (0, 7, 1, 2, 3, 4):
                    write(segment, torch.ones(6, 8))

        with pytest.raises(IndexError, match="segment 7"):
            fill()
        assert (store.read(0) == 1).all()
        with pytest.raises(InputError):
            store.read(1)

    def test_write_behind_does_not_write_waiting_segments_after_an_error_in_the_with_statement(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        write_to_store, started = store.write, threading.Event()
        store.write = lambda *args: (started.set(), time.sleep(0.2), write_to_store(*args))

        def fill():
            with write_behind(store) as write:
                for segment in range(4):
                    write(segment, torch.ones(6, 8))
                started.wait()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fill()
        assert (store.read(0) == 1).all()  # this write had started before the error
        with pytest.raises(InputError):
            store.read(3)


class TestMemoryStore(ActivationStoreContract):
    def make(self, tmp_path, shape):
        return MemoryStore(shape)


class TestZarrStore(ActivationStoreContract):
    in_memory: type[MemoryStore] | None = None

    def make(self, tmp_path, shape):
        tmp_path.mkdir(exist_ok=True)
        resident = None if self.in_memory is None else self.in_memory(shape)
        return ZarrStore.create(tmp_path / "stream", shape, Disk(), durable=False, resident=resident)

    def filled(self, tmp_path):
        store = self.make(tmp_path, SHAPE)
        for segment in range(SHAPE.num_segments):
            store.write(segment, torch.full((6, 8), float(segment)))
        return store

    def test_a_store_can_be_opened_again(self, tmp_path):
        self.filled(tmp_path)
        assert (ZarrStore.open(tmp_path / "stream", SHAPE).read(4) == 4).all()

    def test_files_metadata_and_checksums_of_a_store(self, tmp_path):
        store = self.filled(tmp_path)
        files = sorted(str(path.relative_to(store.path)) for path in store.path.rglob("*") if path.is_file())
        assert files == [*(f"c.{segment}.0.0" for segment in range(5)), "zarr.json"]
        array = zarr.open_array(str(store.path), mode="r")
        assert array.dtype == np.uint16
        assert array.attrs["dtype"] == "bfloat16"
        assert store.checksums() == [[6 * 8 * 2 + 4, crc] for _, crc in store.checksums()]
        for segment in range(5):
            values = torch.from_numpy(np.asarray(array[segment])).view(torch.bfloat16)
            assert torch.equal(values, store.read(segment))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
    def test_chunks_that_zarr_writes_are_read_and_have_the_same_bytes(self, tmp_path, dtype):
        shape, generator = StreamShape(2, 6, 8, dtype), torch.Generator().manual_seed(0)
        store = self.make(tmp_path, shape)
        x = torch.randint(0, 2, (6, 8), generator=generator).to(dtype)
        store.write(0, x)
        array = zarr.open_array(str(store.path), mode="r+")
        bits = {torch.bfloat16: torch.uint16, torch.bool: torch.uint8}.get(dtype, dtype)
        array[1] = x.view(bits).numpy()
        assert torch.equal(ZarrStore.open(store.path, shape).read(1), x)
        assert (store.path / "c.0.0.0").read_bytes() == (store.path / "c.1.0.0").read_bytes()

    @pytest.mark.parametrize(
        "change", [lambda content: content[:-1], lambda content: content + b"0", lambda content: b""]
    )
    def test_a_chunk_of_another_size_is_damaged(self, tmp_path, change):
        store = self.filled(tmp_path)
        chunk = store.path / "c.3.0.0"
        chunk.write_bytes(change(chunk.read_bytes()))
        with pytest.raises(InputError, match=r"c\.3\.0\.0: damaged"):
            ZarrStore.open(store.path, SHAPE).read(3)

    def test_reading_a_chunk_with_a_flipped_bit_is_an_error(self, tmp_path):
        store = self.filled(tmp_path)
        chunk = store.path / "c.3.0.0"
        content = bytearray(chunk.read_bytes())
        content[7] ^= 1
        chunk.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            ZarrStore.open(store.path, SHAPE).read(3)

    def test_a_deleted_chunk_is_an_error_and_not_read_as_zeros(self, tmp_path):
        store = self.filled(tmp_path)
        (store.path / "c.2.0.0").unlink()
        again = ZarrStore.open(store.path, SHAPE)
        with pytest.raises(InputError, match="segment 2 is missing"):
            again.read(2)
        with pytest.raises(InputError, match="segment 2 is missing"):
            again.checksums()

    @pytest.mark.parametrize(
        "other",
        [
            StreamShape(4, 6, 8),
            StreamShape(5, 8, 6),
            StreamShape(5, 6, 8, torch.float16),
            StreamShape(5, 6, 8, torch.float32),
        ],
        ids=str,
    )
    def test_opening_with_another_shape_or_dtype_is_refused(self, tmp_path, other):
        store = self.filled(tmp_path)
        with pytest.raises(InputError, match="expected"):
            ZarrStore.open(store.path, other)

    def test_a_durable_store_syncs_every_file_and_refuses_to_overwrite_a_segment(self, tmp_path):
        seen = []
        disk = Disk(lambda number, name, path: seen.append((name, path.name)))
        store = ZarrStore.create(tmp_path / "stream", SHAPE, disk, durable=True)
        store.write(1, torch.ones(6, 8))
        written = [(name, file) for file in ("zarr.json", "c.1.0.0") for name in ("write", "sync_file")]
        assert seen == [("make_folder", "stream"), *written]
        with pytest.raises(StorageError, match="File exists"):
            store.write(1, torch.zeros(6, 8))
        assert (store.read(1) == 1).all()

    def test_a_full_disk_raises_a_storage_error_that_names_the_chunk(self, tmp_path, monkeypatch):
        store = self.filled(tmp_path)

        def full(path, *arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(disk_module.os, "open", full)
        with pytest.raises(
            StorageError, match=r"c\.2\.0\.0: replace failed: No space left on device\. Free some space"
        ):
            store.write(2, torch.zeros(6, 8))

    def test_opening_a_missing_store_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"zarr\.json: does not describe the expected stream"):
            ZarrStore.open(tmp_path / "nothing", SHAPE)

    def test_a_store_that_is_deleted_while_it_is_opened_is_missing(self, tmp_path, monkeypatch):
        """`check` may run while another process commits a window and deletes the streams of the window before."""
        store = self.filled(tmp_path)
        shutil.rmtree(store.path)
        monkeypatch.setattr(Path, "is_file", lambda path: True)  # deleted after this question
        with pytest.raises(InputError, match=r"zarr\.json: cannot be read: No such file or directory"):
            ZarrStore.open(store.path, SHAPE)

    def test_a_chunk_that_is_deleted_while_it_is_read_is_missing(self, tmp_path, monkeypatch):
        store = self.filled(tmp_path)
        (store.path / "c.1.0.0").unlink()
        monkeypatch.setattr(Path, "is_file", lambda path: True)  # deleted after this question
        with pytest.raises(InputError, match="segment 1 is missing"):
            store.checksums()


class TestZarrStoreWithSegmentsInMemory(TestZarrStore):
    in_memory = MemoryStore

    def test_segments_are_read_from_disk_once_and_checked_there(self, tmp_path):
        store, resident = self.filled(tmp_path), MemoryStore(SHAPE)
        tables = {"stream": store.checksums()}
        opened = ZarrStore.open(store.path, SHAPE, resident=resident)
        assert (opened.read(3) == 3).all()
        assert [segment for segment in range(5) if resident.holds(segment)] == [3]
        chunk = store.path / "c.3.0.0"
        chunk.write_bytes(bytes(chunk.stat().st_size))
        for written in (store, opened):
            assert (written.read(3) == 3).all()
            with pytest.raises(InputError, match=r"c\.3\.0\.0: damaged"):
                written.require_all(tables)
