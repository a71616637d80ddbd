"""The source checkpoint of a run: every tensor must stay what it was when the run first read it, and must be finite."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import ModelTensor, TensorInfo
from cbqstream.digest import BackgroundDigest
from cbqstream.disk import Measure, unmeasured
from cbqstream.errors import IdentityError, InputError, shown
from cbqstream.records import RunWarning


class VerifiedCheckpoint(Checkpoint):
    """A checkpoint that records the SHA-256 of every stored tensor that is read from it, and refuses one that has changed.

    Args:
        infos: every tensor, by name.
        stored: location of every stored tensor, see `Checkpoint`.
        measure: counts the time of reading, hashing and decoding.
    """

    def __init__(
        self,
        infos: Mapping[str, ModelTensor],
        stored: Mapping[str, TensorInfo] | None = None,
        measure: Measure = unmeasured,
    ) -> None:
        super().__init__(infos, stored)
        self._measure = measure
        self._committed: dict[str, str] = {}
        self._seen: dict[str, str] = {}
        self._checked: set[str] = set()
        self._warnings: list[RunWarning] = []

    def remember(self, digests: Mapping[str, str]) -> None:
        """Add the digests of stored tensors, by name, that the run has committed."""
        self._committed.update(digests)

    def take_digests(self) -> dict[str, str]:
        """Digests, by name, of the stored tensors that were read and not taken yet. They count as committed from now on."""
        new = {name: sha256 for name, sha256 in sorted(self._seen.items()) if name not in self._committed}
        self.remember(new)
        return new

    def digests_of(self, names: Iterable[str]) -> dict[str, str]:
        """Digests, by name, of the stored parts of some tensors that this process has read."""
        parts = [part.name for name in names for part in self.infos[name].stored]
        return {part: self._seen[part] for part in parts if part in self._seen}

    def expect(self, names: Iterable[str], digests: Mapping[str, str]) -> None:
        """Add the digests that `digests_of` gave in an interrupted process.

        Args:
            names: names of the tensors.
            digests: digests of their stored parts, by name.

        Raises:
            IdentityError: this process has read something else.
        """
        for part in (part for name in names for part in self.infos[name].stored):
            if part.name in digests:
                self._require_same(part, digests[part.name])
                self._seen[part.name] = digests[part.name]

    def take_warnings(self) -> list[RunWarning]:
        """Warnings since the last call."""
        taken, self._warnings = self._warnings, []
        return taken

    @override
    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`, in `dtype` or in its own.

        Raises:
            InputError: the file can no longer be read, or the tensor holds values that are not finite, or has a dtype that is only copied.
            IdentityError: the tensor is not what it was when this run first read it.
        """
        with self._measure("reading"):
            tensor = self.value(self.infos[name])
        if name not in self._checked and tensor.is_floating_point():
            self._check_values(self.infos[name], tensor)
        self._checked.add(name)
        return tensor.to(device=device, dtype=dtype or tensor.dtype)

    @override
    def _read_stored(self, info: TensorInfo, use: Callable[[memoryview], None] = lambda piece: None) -> Tensor:
        with BackgroundDigest() as digest:
            tensor = super()._read_stored(info, digest.update)
            sha256 = digest.hexdigest()
        self._require_same(info, sha256)
        self._seen[info.name] = sha256
        return tensor

    def _check_values(self, info: ModelTensor, tensor: Tensor) -> None:
        low, high = tensor.aminmax()  # NaN if there is one; many times faster than looking at each value
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise _not_finite(info, tensor)
        if low == high == 0:
            self._warnings.append(RunWarning(f'{info.file}: tensor "{shown(info.name)}" is zero throughout.'))

    @override
    def raw(self, info: ModelTensor) -> Iterator[bytes]:
        """Bytes of one tensor, see `Checkpoint.raw`; the last piece is given only if all of them are what was read before.

        Raises:
            InputError: see `read`.
            IdentityError: see `read`.
        """
        if not isinstance(info, TensorInfo):
            yield from super().raw(info)
            return
        held = b""
        with BackgroundDigest() as digest:
            for piece in super().raw(info):
                yield held
                digest.update(piece)
                held = piece
            self._require_same(info, digest.hexdigest())
        yield held

    def _require_same(self, info: TensorInfo, sha256: str) -> None:
        known = self._committed.get(info.name, self._seen.get(info.name, sha256))
        if sha256 != known:
            raise IdentityError(
                f'{info.file}: tensor "{shown(info.name)}" is not what this run read before. Restore the file.'
            )


def _not_finite(info: ModelTensor, tensor: Tensor) -> InputError:
    places = (~torch.isfinite(tensor.flatten())).nonzero()
    return InputError(
        info.file,
        f"{len(places):,} non-finite values (first at {places[0].item():,}). Download it again, or repair the model.",
        tensor=info.name,
    )
