"""The plan of a run: the memory, disk space and time that it will need.

A plan is computed from headers, config.json and settings, and no weight is read. Sizes are those of the largest block, and the counts
follow the steps of a window (`run/pipeline.py`). `benchmarks/plan_check.py` compares plans with real runs. The time is computed from rates
that are measured on this machine, on layers with the shapes of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from cbqstream.config import QuantizeConfig
from cbqstream.errors import DeviceMemoryError, UsageError
from cbqstream.hub import is_name
from cbqstream.planning.alternatives import smaller_settings
from cbqstream.planning.engines import engine_warnings
from cbqstream.planning.layer_schemes import quantized_share
from cbqstream.planning.memory import (
    CONTEXT,
    STREAM_BYTES,
    TILES,
    OffloadFile,
    device_bytes,
    disk_bytes,
    host_bytes,
    packed_bytes,
    rounding_cost,
    state_bytes,
)
from cbqstream.planning.rates import Rates, measure_rates
from cbqstream.planning.requirements import (
    checked_model,
    load_calibration,
    read_headers,
    require_paths,
    source_warnings,
)
from cbqstream.planning.sizes import ModelSizes
from cbqstream.planning.work import Work, attention_weights, seconds_of
from cbqstream.records import MemoryMode
from cbqstream.rounding.registry import method_of
from cbqstream.runtime.device import choose_device, compute_dtype, fixed_numerics
from cbqstream.runtime.memory import GIB
from cbqstream.windows.schedule import schedule, split_held_out

_MODES = (
    MemoryMode(),
    MemoryMode(activation_checkpointing=True),
    MemoryMode(activation_checkpointing=True, offload=True),
)
"""Memory modes in the order in which they are tried."""


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
    bytes_read: int
    """Number of bytes read from disk."""
    bytes_written: int
    """Number of bytes written to disk."""
    flop: float
    """Floating-point operations of matrix products and of the rounding."""
    rounding_bytes: int
    """Number of bytes that the rounding reads and writes in memory during training."""
    seconds: Mapping[str, float]
    """Parts of the time, by kind of work; empty if the plan was made without rates."""
    memory_mode: MemoryMode
    """Memory mode that keeps the run within the limits."""
    quantized: float | None = None
    """Share of the weights of all blocks that the run quantizes, from 0 to 1; None if the model was not opened."""
    smaller: "Mapping[str, Plan]" = field(default_factory=dict)
    """Plans with smaller settings, by the flags that select them."""
    warnings: Sequence[str] = ()
    """Sentences about programs that do not load the result."""

    def largest(self, name: Literal["ram", "vram"]) -> int:
        """Peak resident memory (`ram`) or device memory (`vram`), the sum of all parts."""
        return sum((self.ram if name == "ram" else self.vram).values())

    @property
    def disk_total(self) -> int:
        """Peak disk space, the sum of all parts."""
        return sum(self.disk.values())

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
        }
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["smaller"] = {flags: other.to_dict() for flags, other in self.smaller.items()}
        plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        return plain | totals | {"memory_mode": asdict(self.memory_mode)}


def make_plan(
    config: QuantizeConfig,
    sizes: ModelSizes,
    device: str,
    rates: Rates | None = None,
    memory_mode: MemoryMode = _MODES[0],
) -> Plan:
    """Make the plan of a run in a given memory mode.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        device: `cpu` or `cuda`.
        rates: rates of the machine, from which the time is computed; None gives a plan without time.
        memory_mode: memory mode of the run.

    Raises:
        UsageError: the settings leave no block to quantize.
    """
    if config.keep_first + config.keep_last >= sizes.num_blocks:
        raise UsageError(
            f"keep_first and keep_last leave none of the {sizes.num_blocks} blocks to quantize. Use smaller values."
        )
    settings, calibration, learns = config.reconstruction, config.calibration, method_of(config.reconstruction).learns
    windows = schedule(config.keep_first, sizes.num_blocks - config.keep_last, config.window)
    in_window = max(window.stop - window.start for window in windows)
    staying = max(window.stop - window.next_start for window in windows)
    quantized = windows[-1].stop - windows[0].start
    on_device = device_bytes(config, sizes, memory_mode, in_window, 2 if device == "cuda" else 4)
    host, cost, packed = host_bytes(config, sizes, device), rounding_cost(config, sizes), packed_bytes(config, sizes)
    checkpointing = memory_mode.activation_checkpointing
    work = Work.of(config, sizes, len(windows), in_window, activation_checkpointing=checkpointing)
    offloaded = OffloadFile.of(config, sizes, in_window, work) if memory_mode.offload else OffloadFile()
    stream = calibration.num_samples * calibration.seq_len * sizes.states * STREAM_BYTES
    stream += calibration.num_samples * sizes.handed(calibration.seq_len)
    training, held_out = (len(part) for part in split_held_out(calibration.num_samples))
    epochs, whole_model = (settings.epochs, settings.end_to_end_epochs) if learns else (0, 0)
    stream_reads = (3 + 2 * (epochs * training + 2 * held_out) / calibration.num_samples) * len(windows)
    products = 2 * calibration.seq_len * work.passes * (sizes.active + attention_weights(config, sizes))
    return Plan(
        windows=len(windows),
        ram=host | ({} if device == "cuda" else on_device),
        vram={"context": CONTEXT, "tiles": TILES} | on_device if device == "cuda" else {},
        disk=disk_bytes(config, sizes, quantized, staying, offloaded),
        source=sizes.source_bytes,
        bytes_read=int(len(windows) * in_window * sizes.block_read + stream_reads * stream)
        + sizes.ends_bytes
        + sizes.outer_read
        + whole_model * sizes.num_blocks * 4 * packed
        + offloaded.read,
        bytes_written=len(windows) * (3 * stream + state_bytes(config, sizes, staying))
        + quantized * packed
        + sizes.outer_bytes
        + offloaded.written,
        flop=products + work.steps * cost.step_flop,
        rounding_bytes=int(work.steps * cost.step_bytes),
        seconds={} if rates is None else seconds_of(config, sizes, work, rates),
        memory_mode=memory_mode,
    )


def fitting_plan(config: QuantizeConfig, sizes: ModelSizes, device: str, rates: Rates | None = None) -> Plan:
    """Make the plan of the first memory mode that stays within the memory limits of the settings.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        device: `cpu` or `cuda`.
        rates: rates of the machine, from which the time is computed; None gives a plan without time.

    Raises:
        DeviceMemoryError: no memory mode stays within the limits; the message names smaller settings that do.
    """
    for mode in _MODES[:-1]:
        made = make_plan(config, sizes, device, rates, mode)
        if _over(config, made) is None:
            return made
    made = make_plan(config, sizes, device, rates, _MODES[-1])
    over = _over(config, made)
    if over is None:
        return made
    name, limit = over
    needs = [f"{part} {size / GIB:.2f}" for part, size in getattr(made, name).items() if size > GIB / 100]
    fits = [
        f"{flags} ({smaller.largest(name) / GIB:.2f})"
        for flags, other in smaller_settings(config).items()
        if _over(config, smaller := make_plan(other, sizes, device, memory_mode=_MODES[-1])) is None
    ]
    remedy = f"These settings fit: {', '.join(fits)}" if fits else "No smaller setting fits; use a higher limit"
    raise DeviceMemoryError(
        f"--max-{name} {limit / GIB:.2f} GiB: this run needs {made.largest(name) / GIB:.2f} ({', '.join(needs)}). {remedy}."
    )


def _over(config: QuantizeConfig, made: Plan) -> tuple[Literal["ram", "vram"], int] | None:
    """Name and size in bytes of a memory limit that a plan exceeds, or None."""
    if config.max_vram is not None and made.largest("vram") > config.max_vram:
        return "vram", config.max_vram
    if config.max_ram is not None and made.largest("ram") > config.max_ram:
        return "ram", config.max_ram
    return None


def plan(
    config: QuantizeConfig,
    *,
    with_time: bool = True,
    revision: str | None = None,
    check_out: bool = True,
    check_dataset: bool = True,
    allow_partial: bool = False,
    allow_links: bool = False,
) -> Plan:
    """Make the plan of a run, after the same checks that `quantize` makes before it writes anything.

    Args:
        config: settings of the run. If the model is a name on the Hub, only headers are fetched, and the dataset is not read.
        with_time: measure the speed of this machine, which takes five seconds.
        revision: branch, tag or commit of a model on the Hub.
        check_out: check OUT and the run directory of the settings.
        check_dataset: read the dataset of the settings.
        allow_partial: accept a model most of whose block weights stay in full precision.
        allow_links: read shards that are links to files outside the model folder.

    Returns:
        The plan, with plans of smaller settings and warnings.

    Raises:
        InputError: the model or the dataset cannot be used.
        UsageError: the settings do not fit the model.
        DeviceMemoryError: the run does not fit the memory limits of the settings.
    """
    model, infos = read_headers(config.model, revision, allow_links=allow_links)
    if check_out:
        require_paths(config)
    device, rates = choose_device(config.device), None
    meta_model = checked_model(config, model, infos, device, allow_partial=allow_partial)
    if check_dataset and not is_name(config.model, revision):
        load_calibration(config, meta_model)
    sizes = ModelSizes.of(meta_model)
    if with_time:
        with fixed_numerics(device, config.threads):
            rates = measure_rates(config, list(sizes.layers.values()), device, compute_dtype(device))
    made = fitting_plan(config, sizes, device.type, rates)
    others = {
        flags: make_plan(other, sizes, device.type, rates, made.memory_mode)
        for flags, other in smaller_settings(config).items()
    }
    warnings = [*source_warnings(config.model, meta_model), *engine_warnings(config, meta_model)]
    quantized = quantized_share(config, meta_model)
    return replace(made, smaller=others, quantized=quantized, warnings=warnings)
