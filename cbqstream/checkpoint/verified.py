"""The source checkpoint as a run reads it: what was read once must stay what it was, and must be numbers."""

import hashlib
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import IdentityError, InputError, shown
from cbqstream.records import RunWarning, TensorInfo


class RunSource(Checkpoint):
    """A checkpoint that knows the SHA-256 of every tensor that was read from it."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        super().__init__(infos)
        self._committed: dict[str, str] = {}
        self._seen: dict[str, str] = {}
        self._warnings: list[RunWarning] = []
        self.seconds = 0.0
        """Spent on reading and hashing so far."""

    def remember(self, digests: Mapping[str, str]) -> None:
        """Take over the digests, by tensor, of what the run has committed."""
        self._committed.update(digests)

    def uncommitted(self) -> dict[str, str]:
        """Digests, by tensor, of what was read and is not in a commit yet."""
        return {name: sha256 for name, sha256 in sorted(self._seen.items()) if name not in self._committed}

    def take_warnings(self) -> list[RunWarning]:
        """What was noticed since this was asked last."""
        taken, self._warnings = self._warnings, []
        return taken

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`, in `dtype` or as stored.

        Raises:
            InputError: the file can no longer be read, or the tensor holds values that are not finite.
            IdentityError: the tensor is not what it was when this run read it first.
        """
        began = time.monotonic()
        tensor = super().read(name, device=torch.device("cpu"))
        info = self.infos[name]
        sha256 = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
        self.seconds += time.monotonic() - began
        self._require_same(info, sha256)
        if name not in self._seen:
            low, high = tensor.aminmax()  # NaN if there is one; many times faster than looking at each value
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise _not_finite(info, tensor)
            self._seen[name] = sha256
            if low == high == 0:
                self._warnings.append(RunWarning(f'{info.file}: tensor "{shown(name)}" is zero throughout.'))
        return tensor.to(device=device, dtype=dtype or info.dtype)

    def raw(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor as they lie in the file, in pieces; the last one only when all of them are what was read before.

        Raises:
            InputError, IdentityError: see `read`.
        """
        digest, held = hashlib.sha256(), b""
        for piece in super().raw(name):
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
