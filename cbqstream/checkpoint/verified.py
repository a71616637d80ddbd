"""The source checkpoint of a run: every tensor must stay what it was when the run first read it, and must be finite."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import Measure, unmeasured
from cbqstream.errors import IdentityError, InputError, shown
from cbqstream.records import RunWarning, TensorInfo


class VerifiedCheckpoint:
    """A checkpoint that records the SHA-256 of every tensor that is read from it, and refuses a tensor that has changed.

    Args:
        checkpoint: the source.
        measure: counts the time of reading and hashing.
    """

    def __init__(self, checkpoint: Checkpoint, measure: Measure = unmeasured) -> None:
        self._checkpoint = checkpoint
        self._measure = measure
        self._committed: dict[str, str] = {}
        self._seen: dict[str, str] = {}
        self._warnings: list[RunWarning] = []

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Location of every tensor, by name."""
        return self._checkpoint.infos

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return self._checkpoint.tensors()

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return self._checkpoint.fingerprint()

    def reading_ahead(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """See `Checkpoint.reading_ahead`."""
        return self._checkpoint.reading_ahead(names)

    def input_quantizer(self, name: str) -> None:
        """None: the source does not quantize inputs."""

    def remember(self, digests: Mapping[str, str]) -> None:
        """Add the digests of tensors, by name, that the run has committed."""
        self._committed.update(digests)

    def take_digests(self) -> dict[str, str]:
        """Digests, by name, of the tensors that were read and not taken yet. They count as committed from now on."""
        new = {name: sha256 for name, sha256 in sorted(self._seen.items()) if name not in self._committed}
        self.remember(new)
        return new

    def take_warnings(self) -> list[RunWarning]:
        """Warnings since the last call."""
        taken, self._warnings = self._warnings, []
        return taken

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`, in `dtype` or as it is stored.

        Raises:
            InputError: the file can no longer be read, or the tensor holds values that are not finite, or has a dtype that is only copied.
            IdentityError: the tensor is not what it was when this run first read it.
        """
        with self._measure("reading"):
            tensor = self._checkpoint.read(name, device=torch.device("cpu"))
            sha256 = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
        info = self.infos[name]
        self._require_same(info, sha256)
        if name not in self._seen and tensor.is_floating_point():
            low, high = tensor.aminmax()  # NaN if there is one; many times faster than looking at each value
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise _not_finite(info, tensor)
            if low == high == 0:
                self._warnings.append(RunWarning(f'{info.file}: tensor "{shown(name)}" is zero throughout.'))
        self._seen[name] = sha256
        return tensor.to(device=device, dtype=dtype or info.dtype)

    def raw(self, name: str) -> Iterator[bytes]:
        """Bytes of one tensor as they are stored, in pieces; the last piece is given only if all of them are what was read before.

        Raises:
            InputError: see `read`.
            IdentityError: see `read`.
        """
        digest, held = hashlib.sha256(), b""
        for piece in self._checkpoint.raw(name):
            yield held
            digest.update(piece)
            held = piece
        self._require_same(self.infos[name], digest.hexdigest())
        yield held

    def _require_same(self, info: TensorInfo, sha256: str) -> None:
        known = self._committed.get(info.name, self._seen.get(info.name, sha256))
        if sha256 != known:
            raise IdentityError(
                f'{info.file}: tensor "{shown(info.name)}" is not what this run read before. Restore the file.'
            )


def _not_finite(info: TensorInfo, tensor: Tensor) -> InputError:
    places = (~torch.isfinite(tensor.flatten())).nonzero()
    return InputError(
        info.file,
        f"{len(places):,} non-finite values (first at {places[0].item():,}). Download it again, or repair the model.",
        tensor=info.name,
    )
