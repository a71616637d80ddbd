"""Activations on disk: a Zarr v3 array [N, S, D], one chunk per segment, codecs bytes and crc32c.

Zarr has no bfloat16, so its bits are stored as uint16, and the attributes name the dtype. Metadata is not trusted: it is compared with the
metadata that Zarr writes for the expected array.

A chunk file is the values of a segment, little-endian, and their crc32c. It is written and read here, in a quarter of the time of Zarr's
functions, which copy each chunk several times and read a missing chunk as zeros. Files are written through `disk.py`. The caller syncs the
folder of a durable store.
"""

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.abc.buffer import Buffer
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore as MemoryOfZarr

from cbqstream.activations.memory_store import MemoryStore
from cbqstream.activations.store import ActivationStore, StoredValue, StreamShape, as_matrix
from cbqstream.disk import Disk, Measure, unmeasured
from cbqstream.errors import InputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

METADATA = "zarr.json"
_HANDED, _SEPARATOR = "+", "="
"""Characters in the name of the folder of values that are handed on with a stream."""
_CRC_BYTES = 4
_STORAGE_DTYPES = {torch.bfloat16: torch.uint16, torch.bool: torch.uint8}
"""Dtypes that are stored with the bits of another one, because Zarr does not have them or does not store them as they are."""


class ZarrStore(ActivationStore):
    """A stream in a folder; created by `create` or `open`. Its segments can stay in memory after they were written or read."""

    def __init__(
        self,
        path: Path,
        shape: StreamShape,
        measure: Measure = unmeasured,
        resident: MemoryStore | None = None,
        write: "Callable[[Path, Iterable[ReadableBuffer]], None] | None" = None,
        make: Callable[[Path, StreamShape], "ZarrStore"] | None = None,
    ) -> None:
        super().__init__(shape, measure)
        self.path = path
        self._resident = resident
        self._write = write
        self._make = make

    @classmethod
    def create(
        cls,
        path: Path,
        shape: StreamShape,
        disk: Disk,
        *,
        durable: bool,
        resident: MemoryStore | None = None,
    ) -> "ZarrStore":
        """Create a new, empty store.

        Args:
            path: folder of the store. It must not exist, but its parent must.
            shape: shape and dtype of the stream.
            disk: writes the files and measures the time.
            durable: whether segments are synced. Each segment of a durable store can be written only once; segments of other stores can be
                overwritten.
            resident: gets every segment that is written or read, and serves later reads; None keeps none in memory.
        """
        disk.make_folder(path)
        write, make = disk.write_plain if durable else disk.replace, partial(cls.create, disk=disk, durable=durable)
        write(path / METADATA, [_metadata(shape)])
        return cls(path, shape, disk.measure, resident, write, make)

    @classmethod
    def open(
        cls,
        path: Path,
        shape: StreamShape,
        measure: Measure = unmeasured,
        resident: MemoryStore | None = None,
    ) -> "ZarrStore":
        """Open an existing store for reading.

        Args:
            path: folder of the store.
            shape: expected shape and dtype of the stream.
            measure: counts the time that is spent waiting for segments.
            resident: see `create`; it may have segments already.

        Raises:
            InputError: the store is missing, or has another shape or dtype.
        """
        metadata, expected = path / METADATA, _metadata(shape)
        try:
            is_expected = metadata.is_file() and metadata.read_bytes() == expected
        except OSError as error:
            raise InputError(metadata, f"cannot be read: {error.strerror}.") from error
        if not is_expected:
            raise InputError(metadata, "does not describe the expected stream.")
        store = cls(path, shape, measure, resident)
        for place in sorted(path.parent.glob(f"{glob.escape(path.name)}{_HANDED}*")):
            key, value_shape, _ = _parsed(place.name)
            opened = cls.open(place, shape_beside(place.name, shape.num_segments), measure)
            store.handed[key] = StoredValue(opened, value_shape)
        return store

    def write(self, segment: int, x_SD: Tensor) -> None:
        """Write the chunk of one segment. See `ActivationStore.write`."""
        self._check(segment, x_SD)
        stored = x_SD.detach().to("cpu", self.shape.dtype).view(_stored_dtype(self.shape))
        values = np.ascontiguousarray(stored.numpy()).reshape(-1).view(np.uint8)
        checksum = google_crc32c.value(values).to_bytes(_CRC_BYTES, "little")
        if self._write is None:
            raise RuntimeError(f"{self.path} is open for reading only")
        self._write(self._chunk(segment), [values.data, checksum])
        if self._resident is not None:
            self._resident.write(segment, x_SD)

    def read(self, segment: int) -> Tensor:
        """Read one segment, from memory if it is there. See `ActivationStore.read`."""
        self._check(segment)
        if self._resident is None:
            return self._read_chunk(segment)
        if not self._resident.holds(segment):
            self._resident.write(segment, self._read_chunk(segment))
        return self._resident.read(segment)

    def _read_chunk(self, segment: int) -> Tensor:
        path = self._chunk(segment)
        size = self.shape.seq_len * self.shape.hidden_size * self.shape.dtype.itemsize
        content = np.empty(size + _CRC_BYTES, np.uint8)
        try:
            with path.open("rb") as file:
                complete = os.fstat(file.fileno()).st_size == len(content) == file.readinto(content.data)
        except FileNotFoundError as error:
            raise InputError(path, f"segment {segment} is missing.") from error
        except OSError as error:
            raise InputError(path, f"cannot be read: {error.strerror}.") from error
        values, checksum = content[:size], content[size:].tobytes()
        if not complete or google_crc32c.value(values) != int.from_bytes(checksum, "little"):
            raise InputError(path, "damaged (its checksum does not match).")
        return torch.from_numpy(values).view(self.shape.dtype).view(self.shape.seq_len, self.shape.hidden_size)

    @property
    def paths(self) -> list[Path]:
        """Folders of the stream and of the values that are handed on with it."""
        stores = [self, *(value.store for value in self.handed.values())]
        return [store.path for store in stores if isinstance(store, ZarrStore)]

    def tables(self) -> dict[str, list[list[int]]]:
        """Result of `checksums` for the stream and for every value that is handed on with it, by the name of the folder.

        Raises:
            InputError: a chunk is missing.
        """
        stores = [self, *(value.store for value in self.handed.values())]
        return {store.path.name: store.checksums() for store in stores if isinstance(store, ZarrStore)}

    def require_all(self, tables: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Check that the stream and the values that are handed on with it are those of `tables`, by reading all of them.

        Raises:
            InputError: something is missing, has changed or is damaged.
        """
        name = self.path.name
        expected = {key: table for key, table in tables.items() if key == name or key.startswith(f"{name}{_HANDED}")}
        stores = [self, *(value.store for value in self.handed.values())]
        if {store.path.name for store in stores if isinstance(store, ZarrStore)} != expected.keys():
            raise InputError(self.path, "is not what was committed (values that are handed on are missing).")
        for store in stores:
            if isinstance(store, ZarrStore):
                store.require(expected[store.path.name], read=True)

    def _new_beside(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> "ZarrStore":
        if self._make is None:
            raise RuntimeError(f"{self.path} is open for reading only")
        parts = key.removeprefix(_HANDED), str(dtype).removeprefix("torch."), "x".join(map(str, shape))
        name = f"{self.path.name}{_HANDED}{_SEPARATOR.join(parts)}"
        return self._make(self.path.with_name(name), shape_beside(name, self.shape.num_segments))

    def checksums(self) -> list[list[int]]:
        """Size in bytes and crc32c of the chunk file of each segment; the crc32c is the last four bytes of the file.

        Raises:
            InputError: a chunk is missing.
        """
        table = []
        for segment in range(self.shape.num_segments):
            path = self._chunk(segment)
            if not path.is_file():
                raise InputError(path, f"segment {segment} is missing.")
            try:
                with path.open("rb") as file:
                    size = file.seek(0, 2)
                    file.seek(max(0, size - _CRC_BYTES))
                    table.append([size, int.from_bytes(file.read(_CRC_BYTES), "little")])
            except FileNotFoundError as error:  # another process deleted it in between
                raise InputError(path, f"segment {segment} is missing.") from error
        return table

    def require(self, checksums: Sequence[Sequence[int]], *, read: bool) -> None:
        """Check that the store still has the given checksums.

        Args:
            checksums: the result of `checksums` at an earlier time.
            read: whether to read every segment too, which compares its content with its crc32c.

        Raises:
            InputError: the store has changed, or is damaged.
        """
        for segment in range(self.shape.num_segments) if read else ():
            self._read_chunk(segment)
        if self.checksums() != checksums:
            raise InputError(self.path, "is not what was committed (its checksums do not match).")

    def _chunk(self, segment: int) -> Path:
        return self.path / f"c.{segment}.0.0"


def shape_beside(name: str, num_segments: int) -> StreamShape:
    """Shape of a store of values that are handed on, from the name of its folder.

    Raises:
        InputError: it is not such a name.
    """
    _, shape, dtype = _parsed(name)
    return StreamShape(num_segments, *as_matrix(shape), dtype)


def _parsed(name: str) -> tuple[str, tuple[int, ...], torch.dtype]:
    """Key, shape and dtype of values that are handed on, from the name of their folder: `stream+key=dtype=2x16`.

    Raises:
        InputError: it is not such a name.
    """
    key, *rest = name[max(0, name.find(_HANDED)) :].split(_SEPARATOR)
    try:
        dtype, sizes = rest
        found = getattr(torch, dtype)
        if not isinstance(found, torch.dtype):
            raise TypeError
        return key, tuple(int(size) for size in sizes.split("x")), found
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(name, "not the name of values that blocks hand on.") from error


def _stored_dtype(shape: StreamShape) -> torch.dtype:
    return _STORAGE_DTYPES.get(shape.dtype, shape.dtype)


def _metadata(shape: StreamShape) -> bytes:
    """Metadata that Zarr writes for a stream."""
    files: dict[str, Buffer] = {}
    zarr.create_array(
        store=MemoryOfZarr(files),
        shape=(shape.num_segments, shape.seq_len, shape.hidden_size),
        chunks=(1, shape.seq_len, shape.hidden_size),
        dtype=str(_stored_dtype(shape)).removeprefix("torch."),
        serializer=BytesCodec(endian="little"),
        filters=None,
        compressors=(Crc32cCodec(),),
        fill_value=0,
        attributes={"dtype": str(shape.dtype).removeprefix("torch.")},
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    return files[METADATA].to_bytes()
