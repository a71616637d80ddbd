"""Activations on disk: a Zarr v3 array [N, S, D], one chunk per segment, codecs bytes and crc32c.

Zarr has no bfloat16, so its bits are stored as uint16 and the dtype is named in the attributes. Zarr would read a missing chunk as zeros,
so its file is looked for first. Metadata is compared with the expected metadata, not trusted. Files are written through `disk.py`; the
caller syncs the folder of a durable store.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.abc.buffer import Buffer
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from cbqstream.activations.store import ActivationStore, StreamShape
from cbqstream.disk import Disk, Measure, unmeasured
from cbqstream.errors import InputError

METADATA = "zarr.json"
_CRC_BYTES = 4
_CARRIERS = {torch.bfloat16: "uint16", torch.float16: "float16", torch.float32: "float32"}
_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.float16, torch.float32: torch.float32}


class _DiskStore(WrapperStore[LocalStore]):
    """A folder in which Zarr keeps an array, and in which every file is written through `disk.py`."""

    def __init__(self, store: LocalStore, disk: Disk, *, durable: bool) -> None:
        super().__init__(store)
        self._disk = disk
        self._durable = durable

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file."""
        await asyncio.to_thread(self._write, self._store.root / key, value.to_bytes())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a file that does not exist."""
        if not await self._store.exists(key):
            await self.set(key, value)

    def _write(self, path: Path, content: bytes) -> None:
        if self._durable:
            self._disk.write(path, [content])
        else:
            self._disk.replace(path, content)


class ZarrStore(ActivationStore):
    """A stream in the folder `path`. Made by `create` or `open`."""

    def __init__(self, path: Path, shape: StreamShape, array: "zarr.Array[Any]", measure: Measure = unmeasured) -> None:
        super().__init__(shape, measure)
        self.path = path
        self._array = array

    @classmethod
    def create(cls, path: Path, shape: StreamShape, disk: Disk, *, durable: bool) -> "ZarrStore":
        """A new, empty store. `path` must not exist; its parent must.

        Args:
            path: a folder.
            shape: shape and dtype of the stream.
            disk: does the writing, and measures it.
            durable: every segment is written once and synced; else segments may be overwritten.
        """
        disk.make_folder(path)
        array = _new_array(_DiskStore(LocalStore(path), disk, durable=durable), shape)
        return cls(path, shape, array, disk.measure)

    @classmethod
    def open(cls, path: Path, shape: StreamShape, measure: Measure = unmeasured) -> "ZarrStore":
        """A store that exists. Its metadata is compared with the metadata of a new store of this shape before Zarr reads it.

        Raises:
            InputError: the store is missing, or has another shape or dtype.
        """
        metadata, expected = path / METADATA, _expected_metadata(shape)
        try:
            is_expected = metadata.is_file() and metadata.read_bytes() == expected
        except OSError as error:
            raise InputError(metadata, f"cannot be read: {error.strerror}.") from error
        if not is_expected:
            raise InputError(metadata, "does not describe the expected stream.")
        return cls(path, shape, zarr.open_array(str(path), mode="r"), measure)

    def write(self, segment: int, x_SD: Tensor) -> None:
        self._check(segment, x_SD)
        stored = x_SD.detach().to("cpu", self.shape.dtype).contiguous().view(_VIEWS[self.shape.dtype])
        self._array[segment] = stored.numpy()

    def read(self, segment: int) -> Tensor:
        self._check(segment)
        if not self._chunk(segment).is_file():
            raise InputError(self._chunk(segment), f"segment {segment} is missing.")
        try:
            values = np.asarray(self._array[segment])
        except (ValueError, OSError) as error:
            raise InputError(self._chunk(segment), "damaged (its checksum does not match).") from error
        return torch.from_numpy(values).view(self.shape.dtype)

    def checksums(self) -> list[list[int]]:
        """[size in bytes, crc32c] of every chunk file, by segment; the crc32c is the last four bytes of the chunk.

        Raises:
            InputError: a chunk is missing.
        """
        table = []
        for segment in range(self.shape.num_segments):
            path = self._chunk(segment)
            if not path.is_file():
                raise InputError(path, f"segment {segment} is missing.")
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - _CRC_BYTES))
                table.append([size, int.from_bytes(file.read(_CRC_BYTES), "little")])
        return table

    def require(self, checksums: Sequence[Sequence[int]], *, read: bool) -> None:
        """Check that the store still has these checksums; with `read`, by reading every segment.

        Raises:
            InputError: the store has changed, or is damaged.
        """
        for segment in range(self.shape.num_segments) if read else ():
            self.read(segment)
        if self.checksums() != checksums:
            raise InputError(self.path, "not what was committed.")

    def _chunk(self, segment: int) -> Path:
        return self.path / f"c.{segment}.0.0"


def _new_array(store: Store, shape: StreamShape) -> "zarr.Array[Any]":
    return zarr.create_array(
        store=store,
        shape=(shape.num_segments, shape.seq_len, shape.hidden_size),
        chunks=(1, shape.seq_len, shape.hidden_size),
        dtype=_CARRIERS[shape.dtype],
        serializer=BytesCodec(endian="little"),
        filters=None,
        compressors=(Crc32cCodec(),),
        fill_value=0,
        attributes={"dtype": str(shape.dtype).removeprefix("torch.")},
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )


def _expected_metadata(shape: StreamShape) -> bytes:
    files: dict[str, Buffer] = {}
    _new_array(MemoryStore(files), shape)
    return files[METADATA].to_bytes()
