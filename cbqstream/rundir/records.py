"""The records of a run directory: run.json, and one commit for every window and epoch.

On disk a record is canonical JSON that names its own SHA-256 as `self`. A commit also names the digest of the record before it as `prev`,
so a record that was changed, lost, or taken from another run is detected.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from typing_extensions import override

from cbqstream.config import QuantizeConfig
from cbqstream.disk import FileDigest
from cbqstream.errors import UsageError
from cbqstream.records import EpochReport, Numerics, WindowReport, report_from_dict
from cbqstream.rundir.identity import FORMAT, Identity, digest_of

Checksums = list[list[int]]
"""Size in bytes and crc32c of every chunk of a stream."""


class Record(ABC):
    """A record that is sealed with its own digest."""

    __slots__ = ()

    @property
    def digest(self) -> str:
        """SHA-256 that the record is sealed with."""
        return digest_of(self._body())

    def to_dict(self) -> dict[str, Any]:
        """The record as it is stored."""
        return sealed(self._body())

    @abstractmethod
    def _body(self) -> dict[str, Any]:
        """The record without its digest, as plain values."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; the seal is not checked.

        Raises:
            ValueError: a field is missing, unknown, or has another type.
        """


@dataclass(frozen=True, slots=True)
class RunRecord(Record):
    """Content of run.json: what a run is, as it began."""

    version: str
    """Version of cbqstream that began the run."""
    identity: Identity
    config: QuantizeConfig
    windows: int
    """Number of windows."""
    epochs: int
    """Number of epochs of the end-to-end stage after the last window."""
    stream: tuple[int, int, int]
    """Shape [N, S, D] of a stream of hidden states."""

    @override
    def _body(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "identity": self.identity.to_dict(),
            "config": self.config.to_dict(),
            "windows": self.windows,
            "epochs": self.epochs,
            "stream": list(self.stream),
        }

    @classmethod
    @override
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        try:
            segments, tokens, hidden = (int(size) for size in values["stream"])
            return cls(
                str(values["version"]),
                Identity.from_dict(values["identity"]),
                QuantizeConfig.from_dict(values["config"]),
                int(values["windows"]),
                int(values["epochs"]),
                (segments, tokens, hidden),
            )
        except (KeyError, TypeError, AttributeError, OverflowError, UsageError) as error:
            raise ValueError(f"not the record of a run: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Record):
    """Record of a finished window or epoch: what it wrote, and what it was made from."""

    window: int
    """Number of the window; epochs are numbered on after the last window."""
    prev: str
    """Digest of the record before it; for the first commit, of run.json."""
    parts: Mapping[str, FileDigest]
    """Digest of each file in the window's folder of parts/, by name."""
    acts: Mapping[str, Checksums] | None
    """Checksums of the streams that the next window reads; None if they are those that are there already."""
    source: Mapping[str, str]
    """SHA-256 of each tensor of the source that was read for the first time, by name."""
    numerics: Numerics
    report: WindowReport | EpochReport

    @override
    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "window": self.window,
            "prev": self.prev,
            "parts": {name: [digest.size, digest.sha256] for name, digest in self.parts.items()},
            "acts": None if self.acts is None else dict(self.acts),
            "source": dict(self.source),
            "numerics": asdict(self.numerics),
            "report": self.report.to_dict(),
        }

    @classmethod
    @override
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        try:
            acts = values["acts"]
            return cls(
                window=int(values["window"]),
                prev=str(values["prev"]),
                parts={name: FileDigest(int(size), str(sha256)) for name, (size, sha256) in values["parts"].items()},
                acts=None if acts is None else dict(acts),
                source=dict(values["source"]),
                numerics=Numerics(**values["numerics"]),
                report=report_from_dict(values["report"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not the record of a window: {error}") from error


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own digest."""
    return {**body, "self": digest_of(dict(body))}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether a record has the digest that it names."""
    try:
        return record.get("self") == digest_of({key: value for key, value in record.items() if key != "self"})
    except RecursionError:  # JSON can be nested somewhat deeper when it is read than when it is written
        return False
