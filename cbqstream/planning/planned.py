"""The figures of a plan, and the names of memory modes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from cbqstream.planning.disk_rates import DiskRates
from cbqstream.records import MemoryMode


@dataclass(frozen=True, slots=True)
class Plan:
    """Requirements of a run, in bytes, seconds and floating-point operations."""

    windows: int
    """Number of windows."""
    ram: Mapping[str, int]
    """Parts of the peak resident memory, by purpose; the peak is their sum."""
    vram: Mapping[str, int]
    """Parts of the peak memory of a CUDA device, by purpose; empty on the CPU."""
    disk: Mapping[str, int]
    """Parts of the peak disk space, without the source, by purpose."""
    source: int
    """Size of the source."""
    read: Mapping[str, int]
    """Parts of the bytes read from disk, by purpose."""
    written: Mapping[str, int]
    """Parts of the bytes written to disk, by purpose."""
    bus: Mapping[str, int]
    """Parts of the bytes that are copied between memory and a CUDA device, by purpose; empty on the CPU."""
    flop: float
    """Floating-point operations of matrix products and of the rounding."""
    rounding_bytes: int
    """Number of bytes that the rounding reads and writes in memory during training."""
    seconds: Mapping[str, float]
    """Parts of the time, by kind of work; empty if the plan was made without rates."""
    memory_mode: MemoryMode
    """Memory mode of the run: the first one that keeps it within the limits."""
    exceeded: str | None = None
    """The limit that the run does not stay within, such as `--max-ram 8.00 GiB`; None if it stays within all limits."""
    quantized: float | None = None
    """Share of the weights of all blocks that the run quantizes, from 0 to 1; None if the model was not opened."""
    reason: str = ""
    """The reason for the memory mode, as a clause."""
    modes: "Mapping[str, Plan]" = field(default_factory=dict)
    """Plans of all memory modes, by their names. They give the same result."""
    smaller: "Mapping[str, Plan]" = field(default_factory=dict)
    """Plans with smaller settings, by the flags that select them. They give another result."""
    disks: DiskRates | None = None
    """Speed of the disks from which the time is computed; None if the time of the disk is not counted."""
    warnings: Sequence[str] = ()
    """Sentences about disk traffic, and about programs that do not load the result."""

    def largest(self, name: Literal["ram", "vram"]) -> int:
        """Peak resident memory (`ram`) or device memory (`vram`), the sum of all parts."""
        return sum((self.ram if name == "ram" else self.vram).values())

    @property
    def disk_total(self) -> int:
        """Peak disk space, the sum of all parts."""
        return sum(self.disk.values())

    @property
    def bytes_read(self) -> int:
        """Number of bytes read from disk, the sum of all parts."""
        return sum(self.read.values())

    @property
    def bytes_written(self) -> int:
        """Number of bytes written to disk, the sum of all parts."""
        return sum(self.written.values())

    @property
    def way(self) -> str:
        """Name of the memory mode."""
        return name_of_mode(self.memory_mode)

    @property
    def seconds_total(self) -> float:
        """Time in seconds, the sum of all parts; 0 if the plan was made without rates."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values with totals, for JSON."""
        totals = {
            "ram_total": self.largest("ram"),
            "vram_total": self.largest("vram"),
            "disk_total": self.disk_total,
            "seconds_total": self.seconds_total,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "bus_total": sum(self.bus.values()),
        }
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("modes", "smaller"):
            values[name] = {key: other.to_dict() for key, other in values[name].items()}
        plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        disks = None if self.disks is None else asdict(self.disks)
        return plain | totals | {"way": self.way, "memory_mode": asdict(self.memory_mode), "disks": disks}


def name_of_mode(memory_mode: MemoryMode) -> str:
    """Name of a memory mode."""
    found = "all layers in memory"
    if memory_mode.activation_checkpointing:
        found = "layers on disk" if memory_mode.offload else "activation checkpointing"
    on_disk = {"inputs of experts": memory_mode.expert_inputs_on_disk, "streams": memory_mode.streams_on_disk}
    named = " and ".join(name for name, there in on_disk.items() if there)
    return f"{found}, {named} on disk" if named else found
