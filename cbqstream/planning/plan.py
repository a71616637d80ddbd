"""What a run will need, from headers, config.json and settings alone: no weight is read and no model is built.

Everything is counted for the largest block, in the order in which a window does things (`pipeline.py`); `benchmarks/plan_check.py` holds
the counts against real runs. The time comes from rates that are measured here and now, on layers of the model's shape.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cbqstream.activations.read_ahead import READ_DEPTH
from cbqstream.activations.write_behind import WRITE_DEPTH
from cbqstream.config import QuantizeConfig
from cbqstream.errors import DeviceMemoryError, UsageError
from cbqstream.hub import is_name
from cbqstream.numerics.losses import HEAD_TOKENS
from cbqstream.numerics.slabs import SLAB_WEIGHTS
from cbqstream.planning.alternatives import smaller_settings
from cbqstream.planning.rates import Rates, measure_rates
from cbqstream.planning.sizes import ModelSizes
from cbqstream.records import MemoryMode
from cbqstream.runtime.device import choose_device, compute_dtype, make_deterministic
from cbqstream.runtime.memory import GIB
from cbqstream.windows.schedule import schedule, split_held_out
from cbqstream.windows.step_sizes import SEGMENTS_A_STEP

_PROCESS = {"cpu": 385 << 20, "cuda": 2 << 30}
"""Resident memory of a process that has imported everything and done a little; on CUDA an estimate."""
CONTEXT = 700 << 20
"""Device memory of a CUDA context and its workspaces; an estimate."""
_TILES = 320 << 20
"""What is computed of a tile on CUDA (`affine.row_tiles`): ten values in float32 for each weight of it."""
_HEAP = 1.25
"""What glibc keeps between allocations, as fitted to runs (benchmarks/plan_check.py)."""
_START = 4.0
"""Seconds to import everything and to open the model."""
_STREAM_BYTES, _LOGIT_COPIES, _VALUE_BYTES, _FOLD_BYTES = 2, 6, 2, 14
_GRID_SEARCH = {True: 22, False: 120}
"""What looking for the grid of a symmetric, and of an asymmetric weight takes, in training steps of its rounding."""
_ELEMENTWISE = {None: 14, 8: 21, 4: 21}
"""Values of a block's activations that are read or written elementwise in training, for one value of its layers' outputs; by the width
that inputs are quantized to."""


_STEPS = (
    MemoryMode(),
    MemoryMode(activation_checkpointing=True),
    MemoryMode(activation_checkpointing=True, offload=True),
)
"""In the order in which they are given up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs. Bytes, seconds, floating-point operations."""

    windows: int
    ram: Mapping[str, int]
    """Peak resident memory, by what it is for; the sum counts."""
    vram: Mapping[str, int]
    """The same on a CUDA device; empty on the CPU."""
    disk: Mapping[str, int]
    """At the fullest, besides the source."""
    source: int
    bytes_read: int
    bytes_written: int
    flop: float
    seconds: Mapping[str, float]
    """By what is being done; empty where no rates were given."""
    memory_mode: MemoryMode
    """What keeps the limits."""

    def largest(self, name: Literal["ram", "vram"]) -> int:
        """All parts together."""
        return sum((self.ram if name == "ram" else self.vram).values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with totals."""
        totals = {f"{name}_total": sum(getattr(self, name).values()) for name in ("ram", "vram", "disk", "seconds")}
        values = {name: getattr(self, name) for name in self.__slots__ if name != "memory_mode"}
        plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        return plain | asdict(self.memory_mode) | totals


def make_plan(
    config: QuantizeConfig,
    sizes: ModelSizes,
    device: str,
    rates: Rates | None = None,
    memory_mode: MemoryMode = _STEPS[0],
) -> Plan:
    """Count.

    Args:
        config: of the run.
        sizes: of the model.
        device: `cpu` or `cuda`.
        rates: of the machine, for the time.
        memory_mode: see `Plan`.

    Raises:
        UsageError: nothing is left to quantize.
    """
    if config.keep_first + config.keep_last >= sizes.num_blocks:
        raise UsageError(f"keep_first and keep_last leave none of the {sizes.num_blocks} blocks to quantize.")
    windows = schedule(config.keep_first, sizes.num_blocks - config.keep_last, config.window)
    in_window = max(window.stop - window.start for window in windows)
    staying = max(window.stop - window.next_start for window in windows)
    on_device = _device_bytes(config, sizes, memory_mode, in_window, 2 if device == "cuda" else 4)
    host = {"process": _PROCESS[device]}
    if device == "cuda":  # a layer in slabs beside its block while that is packed, or the embeddings as they are read
        packing = _packed_bytes(config, sizes) + 9 * min(sizes.largest, SLAB_WEIGHTS)
        host["packing"] = max(packing, sizes.stored * sizes.vocabulary * sizes.hidden)
    if config.reconstruction.end_to_end_epochs:
        host["step sizes before an epoch"] = sizes.num_blocks * _scale_bytes(config, sizes, 4)
    tokens = config.calibration.num_samples * config.calibration.seq_len
    stream, settings = tokens * sizes.hidden * _STREAM_BYTES, config.reconstruction
    packed = _packed_bytes(config, sizes)
    quantized = windows[-1].stop - windows[0].start
    values = _VALUE_BYTES * sizes.weights if settings.rounding == "signround" else 0
    carried = staying * (values + _scale_bytes(config, sizes, 8))
    samples = config.calibration.num_samples
    training, held_out = (len(part) for part in split_held_out(samples))
    learns = settings.rounding != "nearest"
    epochs = settings.epochs if learns else 0
    passes = (3 + 2 * (epochs * training + 2 * held_out) / samples) * len(windows)  # of a stream, read
    whole_model = settings.end_to_end_epochs if learns else 0
    work = _work(
        config,
        sizes,
        len(windows),
        in_window,
        training,
        held_out,
        activation_checkpointing=memory_mode.activation_checkpointing,
    )
    offload_file = _OffloadFile.of(config, sizes, in_window, work) if memory_mode.offload else _OffloadFile()
    return Plan(
        windows=len(windows),
        ram=host | ({} if device == "cuda" else on_device) | _queues(config, sizes),
        vram={"context": CONTEXT, "tiles": _TILES} | on_device if device == "cuda" else {},
        disk={
            "streams": 5 * stream,
            "blocks": quantized * packed * (2 if whole_model else 1),  # the last epoch writes all of them again
            "carried over": 2 * carried,
            "rest of the model": sizes.source_bytes - quantized * sizes.block_bytes,
            "layers of a window": offload_file.size,
        },
        source=sizes.source_bytes,
        bytes_read=int(len(windows) * in_window * sizes.block_bytes + passes * stream + 2 * sizes.outer_bytes)
        + whole_model * sizes.num_blocks * 4 * packed
        + offload_file.read,
        bytes_written=len(windows) * (3 * stream + carried)
        + quantized * packed
        + sizes.outer_bytes
        + offload_file.written,
        flop=2 * config.calibration.seq_len * work["segment passes"] * (sizes.active + _attention(config, sizes)),
        seconds={} if rates is None else _seconds(config, sizes, work, rates),
        memory_mode=memory_mode,
    )


def _device_bytes(
    config: QuantizeConfig, sizes: ModelSizes, memory_mode: MemoryMode, blocks: int, width: int
) -> dict[str, int]:
    """The largest moment of a window that learns, of the embeddings, or of the stage after the windows."""
    settings, calibration = config.reconstruction, config.calibration
    batch = settings.batch_size * calibration.seq_len
    saved = 2 * sizes.outputs + (4 * sizes.hidden if config.scheme.activation_bits else 0)
    kept = 1 if memory_mode.activation_checkpointing else blocks
    attention = 8 * sizes.eager_heads * batch * calibration.seq_len  # scores and their softmax, of all heads
    layers = sizes.largest if memory_mode.offload else blocks * sizes.weights
    rest = sizes.block_bytes - sizes.weights * sizes.stored
    window = {
        "weights": blocks * rest
        + layers * sizes.stored * (2 if config.outliers.weights else 1),  # truncated ones beside them
        "rounding": layers * _VALUE_BYTES if settings.rounding == "signround" else 0,
        "step sizes": blocks * _scale_bytes(config, sizes, 24),
        "scratch": 2 * width * min(sizes.largest, SLAB_WEIGHTS),
        "activations": int(_HEAP * width * batch * ((kept + 1) * saved + (8 + blocks) * sizes.hidden))
        + (kept + 1) * attention,
    }
    matrix = sizes.vocabulary * sizes.hidden
    head = {"head and logits": width * matrix + _LOGIT_COPIES * 4 * HEAD_TOKENS * sizes.vocabulary}
    last = window | (head if settings.head_weight and settings.rounding != "nearest" else {})
    moments = [last, {"embeddings": (width + sizes.stored) * matrix}]
    if settings.end_to_end_epochs and settings.rounding != "nearest":
        together = min(SEGMENTS_A_STEP, settings.batch_size) * calibration.seq_len
        of_block = (
            2 * saved + (9 + sizes.num_blocks) * sizes.hidden
        )  # states between all blocks, and one block with gradients
        seen = 2 * 8 * sizes.eager_heads * together * calibration.seq_len
        moments.append(
            {
                "weights": rest + width * 2 * sizes.weights + 8 * sizes.largest,
                "step sizes": sizes.num_blocks * _scale_bytes(config, sizes, 20),  # s0, theta, gradient, two moments
                "activations": int(_HEAP * width * together * of_block) + seen,
                "embedding, head and logits": width * (sizes.outer_bytes // sizes.stored)
                + head["head and logits"]
                - width * matrix,
            }
        )
    if memory_mode.offload and config.outliers.folds(config.scheme):  # looks at the layers of a fold together
        moments.append({"step sizes": window["step sizes"], "rescaling": 2 * _FOLD_BYTES * sizes.largest})
    return max(moments, key=lambda parts: sum(parts.values()))


@dataclass(frozen=True, slots=True)
class _OffloadFile:
    """The file in which the layers of a window lie while they are not used, bytes; it only grows."""

    size: int = 0
    read: int = 0
    written: int = 0

    @classmethod
    def of(cls, config: QuantizeConfig, sizes: ModelSizes, in_window: int, work: Mapping[str, float]) -> Self:
        """A step reads every layer three times (activations are computed again), and writes what moved; all else reads it once a batch."""
        values = _VALUE_BYTES if config.reconstruction.rounding == "signround" else 0
        truncated = sizes.stored if config.outliers.weights else 0
        each = sizes.weights * (sizes.stored + values + truncated)
        finished = sizes.weights + _packed_bytes(config, sizes)  # codes, alone and packed
        read = (3 * work["steps"] + work["hard batches"] + work["stream batches"]) * each
        written = (
            work["steps"] * sizes.weights * values + work["windows"] * in_window * each + work["blocks"] * finished
        )
        return cls(in_window * (each + finished), int(read), int(written))


def _queues(config: QuantizeConfig, sizes: ModelSizes) -> dict[str, int]:
    """Segments of two streams that were read ahead, and of one that are not written yet."""
    segment = _STREAM_BYTES * config.calibration.seq_len * sizes.hidden
    read = 2 * (READ_DEPTH + 1) * config.reconstruction.batch_size
    return {"read ahead": read * segment, "written behind": (WRITE_DEPTH + 1) * segment}


def _scale_bytes(config: QuantizeConfig, sizes: ModelSizes, each: int) -> int:
    """What is kept for each scale of a block, `each` bytes."""
    size = config.scheme.group_size
    return each * sum(rows * (1 if size is None else columns // size) for rows, columns in sizes.layers.values())


def _packed_bytes(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """A finished block on disk."""
    codes, chosen = 0, config.schemes
    for name, (rows, columns) in sizes.layers.items():
        path = name.removesuffix(".weight")
        bits = 8 * sizes.stored if config.is_ignored(path) else chosen.of(path).num_bits
        codes += rows * -(-columns * bits // 32) * 4
    zero_points = 0 if config.scheme.symmetric else _scale_bytes(config, sizes, 1) * config.scheme.num_bits // 8
    rest = sizes.block_bytes - sizes.weights * sizes.stored
    return codes + _scale_bytes(config, sizes, sizes.stored) + zero_points + rest


def _attention(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """What attention multiplies for a token, in weights: half of S keys and half of S values."""
    return config.calibration.seq_len * sizes.hidden


def _work(
    config: QuantizeConfig,
    sizes: ModelSizes,
    windows: int,
    in_window: int,
    training: int,
    held_out: int,
    *,
    activation_checkpointing: bool,
) -> dict[str, float]:
    """How often a segment passes a block, in forward passes and in training steps (three of them), and how many steps there are."""
    settings = config.reconstruction
    epochs = settings.epochs if settings.rounding != "nearest" else 0
    stride = config.window.size - config.window.overlap
    samples = config.calibration.num_samples
    forward = windows * (samples * (stride + in_window + stride) + 2 * held_out * in_window)
    trained = windows * epochs * training * in_window
    steps = windows * epochs * math.ceil(training / settings.batch_size)
    if activation_checkpointing:
        forward += trained
    if settings.end_to_end_epochs and settings.rounding != "nearest":
        forward += settings.end_to_end_epochs * sizes.num_blocks * (training + 2 * held_out)
        trained += settings.end_to_end_epochs * sizes.num_blocks * training
    return {
        "forward": forward,
        "trained": trained,
        "segment passes": forward + 3 * trained,
        "steps": steps * in_window,
        "hard batches": 2 * windows * in_window * math.ceil(held_out / settings.batch_size),
        "stream batches": windows * (2 * stride + in_window) * math.ceil(samples / settings.batch_size),
        "windows": windows,
        "blocks": windows * stride,
        "head segments": epochs * training + 2 * held_out if settings.head_weight else 0,
    }


def _seconds(config: QuantizeConfig, sizes: ModelSizes, work: Mapping[str, float], rates: Rates) -> dict[str, float]:
    seq_len = config.calibration.seq_len
    products = (work["trained"] + work["forward"] / 3) * seq_len * (sizes.active + 2 * _attention(config, sizes))
    grids = _GRID_SEARCH[config.scheme.symmetric] if config.reconstruction.init == "search" else 1
    weights = (work["steps"] + work["hard batches"] + grids * work["blocks"]) * sizes.weights
    elementwise = _ELEMENTWISE[config.scheme.activation_bits]
    values = (work["trained"] + work["forward"] / 3) * seq_len * elementwise * sizes.outputs
    seen = work["head segments"] * seq_len / config.reconstruction.head_stride
    products += seen * sizes.vocabulary * sizes.hidden
    values += seen * sizes.vocabulary * _LOGIT_COPIES
    return {
        "matrix products": products * rates.product,
        "rounding": weights * rates.weight,
        "other elementwise work": values * rates.value,
        "starting": _START,
    }


def fitting_plan(config: QuantizeConfig, sizes: ModelSizes, device: str, rates: Rates | None = None) -> Plan:
    """The plan within the limits of the settings: what costs time and no bit of the result is given up first.

    Raises:
        DeviceMemoryError: nothing fits; the message says what would.
    """
    for memory_mode in _STEPS[:-1]:
        plan = make_plan(config, sizes, device, rates, memory_mode)
        if _over(config, plan) is None:
            return plan
    plan = make_plan(config, sizes, device, rates, _STEPS[-1])
    over = _over(config, plan)
    if over is None:
        return plan
    name, limit = over
    needs = [f"{part} {size / GIB:.2f}" for part, size in getattr(plan, name).items() if size > GIB / 100]
    fits = [
        f"{flags} ({made.largest(name) / GIB:.2f})"
        for flags, other in smaller_settings(config).items()
        if _over(config, made := make_plan(other, sizes, device, memory_mode=_STEPS[-1])) is None
    ]
    remedy = f"These fit: {', '.join(fits)}" if fits else "No smaller batch or window fits either; give it more"
    raise DeviceMemoryError(
        f"--max-{name} {limit / GIB:.2f} GiB: this run needs {plan.largest(name) / GIB:.2f} ({', '.join(needs)}). {remedy}."
    )


def _over(config: QuantizeConfig, plan: Plan) -> tuple[Literal["ram", "vram"], int] | None:
    """The limit that a plan does not keep."""
    if config.max_vram is not None and plan.largest("vram") > config.max_vram:
        return "vram", config.max_vram
    if config.max_ram is not None and plan.largest("ram") > config.max_ram:
        return "ram", config.max_ram
    return None


def plan(config: QuantizeConfig, *, with_time: bool = True, revision: str | None = None) -> dict[str, Any]:
    """What a run will need, as plain values: bytes, seconds, floating-point operations.

    Args:
        config: its settings; the dataset is not read, and of a model that is a name on the Hub only headers are fetched.
        with_time: measure this machine for five seconds.
        revision: branch, tag or commit of such a model.

    Returns:
        `Plan.to_dict()`, and under "smaller" the same with smaller settings, by the flags that ask for them.

    Raises:
        InputError: the model cannot be read.
        UsageError: the settings do not fit it.
        DeviceMemoryError: it does not fit the limits of the settings.
    """
    name = config.model
    sizes = ModelSizes.of_name(name, revision) if is_name(name, revision) else ModelSizes.of(Path(name))
    for layer, (_, columns) in sizes.layers.items():
        path = layer.removesuffix(".weight")
        if not config.is_ignored(path):
            config.schemes.of(path).require_whole_groups(layer, columns)
    device, rates = choose_device(config.device), None
    if with_time:
        make_deterministic(config.threads)
        rates = measure_rates(config, list(sizes.layers.values()), device, compute_dtype(device))
    made = fitting_plan(config, sizes, device.type, rates)
    others = {
        flags: make_plan(other, sizes, device.type, rates, made.memory_mode).to_dict()
        for flags, other in smaller_settings(config).items()
    }
    return {**made.to_dict(), "smaller": others}
