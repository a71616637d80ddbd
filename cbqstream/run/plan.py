"""What a run will need, from headers, config.json and settings alone: no weight is read and no model is built.

Everything is counted for the largest block, in the order in which a window does things (`pipeline.py`); `benchmarks/plan_check.py` holds
the counts against real runs. The time comes from rates that are measured here and now, on layers of the model's shape.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cbqstream.checkpoint.folder import find_tensors, read_json
from cbqstream.config import QuantizeConfig
from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.compute import choose_device, compute_dtype, make_deterministic
from cbqstream.models.families import FAMILIES
from cbqstream.numerics.scratch import Scratch
from cbqstream.numerics.straight_through import StraightThrough, passes_for, straight_through_product
from cbqstream.records import TensorInfo
from cbqstream.windows.schedule import schedule, split_guard

_PROCESS = {"cpu": 385 << 20, "cuda": 2 << 30}
"""Resident memory of a process that has imported everything and done a little; on CUDA an estimate."""
_CONTEXT = 700 << 20
"""Device memory of a CUDA context and its workspaces; an estimate."""
_HEAP = 1.1
"""What glibc keeps between allocations."""
_STREAM_BYTES, _LOGIT_TOKENS, _LOGIT_COPIES, _READ_AHEAD = 2, 128, 6, 3
_GRID_CANDIDATES = {True: 80, False: 16}
_ELEMENTWISE = 14
"""Values of a block's activations that are read or written elementwise in training, for one value of its layers' outputs."""
_MEASURED_WEIGHTS, _MEASURED_TOKENS = 4 << 20, 1024


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Counts of a model; those of a block are of the largest."""

    num_blocks: int
    hidden: int
    vocabulary: int
    layers: tuple[tuple[int, int], ...]
    """[O, I] of each linear layer of a block."""
    stored: int
    """Bytes of a stored weight."""
    block_bytes: int
    source_bytes: int
    ends: int
    """Parameters outside the blocks."""
    ends_bytes: int

    @property
    def weights(self) -> int:
        """Of the linear layers of a block."""
        return sum(rows * columns for rows, columns in self.layers)

    @property
    def largest(self) -> int:
        """Weights of the largest layer."""
        return max(rows * columns for rows, columns in self.layers)

    @property
    def outputs(self) -> int:
        """Values that the layers of a block give for a token."""
        return sum(rows for rows, _ in self.layers)

    @classmethod
    def of(cls, folder: Path) -> "ModelSizes":
        """Of the model in a folder.

        Raises:
            InputError: it cannot be read, or is of an architecture that is not known.
        """
        model, infos = read_json(folder, "config.json"), find_tensors(folder)
        family = FAMILIES.get(str(model.get("model_type")))
        if family is None:
            raise InputError(
                folder / "config.json",
                f'architecture "{shown(str(model.get("model_type")))}" is not supported (known: {", ".join(FAMILIES)}).',
            )
        blocks = _by_block(infos, family.blocks)
        if not blocks:
            raise InputError(folder, f'no tensors of "{family.blocks}.0".')
        largest = max(blocks.values(), key=lambda tensors: sum(info.num_bytes for info in tensors))
        matrices = [info for info in largest if len(info.shape) == 2]
        in_blocks = {info.name for tensors in blocks.values() for info in tensors}
        outside = [info for name, info in infos.items() if name not in in_blocks]
        return cls(
            len(blocks),
            int(model.get("hidden_size") or 0),
            int(model.get("vocab_size") or 0),
            tuple((info.shape[0], info.shape[1]) for info in matrices),
            max(info.dtype.itemsize for info in matrices),
            sum(info.num_bytes for info in largest),
            sum(info.num_bytes for info in infos.values()),
            sum(math.prod(info.shape) for info in outside),
            sum(info.num_bytes for info in outside),
        )


def _by_block(infos: Mapping[str, TensorInfo], path: str) -> dict[int, list[TensorInfo]]:
    """The tensors of each block; checkpoints may leave out the first part of the path."""
    blocks: dict[int, list[TensorInfo]] = {}
    for prefix in (f"{path}.", f"{path.partition('.')[2]}."):
        for name, info in infos.items():
            number = name.removeprefix(prefix).partition(".")[0]
            if name.startswith(prefix) and number.isdigit():
                blocks.setdefault(int(number), []).append(info)
        if blocks:
            break
    return blocks


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds on this machine."""

    product: float
    """Of a weight, a token and a training step: output, gradient of the input, gradient of the weight."""
    weight: float
    """Of a weight and a training step, whatever the tokens: its rounding, forward twice and backward."""
    value: float
    """Of reading or writing a value of the activations."""


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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with totals."""
        totals = {f"{name}_total": sum(getattr(self, name).values()) for name in ("ram", "vram", "disk", "seconds")}
        values = {name: getattr(self, name) for name in self.__slots__}
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()} | totals


def make_plan(config: QuantizeConfig, sizes: ModelSizes, device: str, rates: Rates | None = None) -> Plan:
    """Count.

    Args:
        config: of the run.
        sizes: of the model.
        device: `cpu` or `cuda`.
        rates: of the machine, for the time.

    Raises:
        UsageError: nothing is left to quantize.
    """
    if config.keep_first + config.keep_last >= sizes.num_blocks:
        raise UsageError(f"keep_first and keep_last leave none of the {sizes.num_blocks} blocks to quantize.")
    windows = schedule(config.keep_first, sizes.num_blocks - config.keep_last, config.window)
    in_window = max(window.stop - window.start for window in windows)
    staying = max(window.stop - window.next_start for window in windows)
    on_device = _device_bytes(config, sizes, in_window, 2 if device == "cuda" else 4)
    host = {"process": _PROCESS[device]}
    tokens = config.calibration.num_samples * config.calibration.seq_len
    stream, settings = tokens * sizes.hidden * _STREAM_BYTES, config.reconstruction
    packed = _packed_bytes(config, sizes)
    quantized = windows[-1].stop - windows[0].start
    carried = staying * (sizes.weights * 2 + _scale_bytes(config, sizes, 8))
    training, guard = (len(part) for part in split_guard(config.calibration.num_samples))
    learns = settings.rounding != "none"
    epochs = settings.epochs if learns else 0
    passes = (3 + 2 * (epochs * training + 2 * guard) / (training + guard)) * len(windows)  # of a stream, read
    whole_model = settings.end_to_end_epochs if learns else 0
    work = _work(config, sizes, len(windows), in_window, training, guard)
    return Plan(
        windows=len(windows),
        ram=host | ({} if device == "cuda" else on_device) | _read_ahead(config, sizes),
        vram={"context": _CONTEXT} | on_device if device == "cuda" else {},
        disk={
            "streams": 5 * stream,
            "blocks": quantized * packed,
            "carried over": 2 * carried,
            "rest of the model": sizes.source_bytes - quantized * sizes.block_bytes,
        },
        source=sizes.source_bytes,
        bytes_read=int(len(windows) * in_window * sizes.block_bytes + passes * stream + 2 * sizes.ends_bytes)
        + whole_model * sizes.num_blocks * 4 * packed,
        bytes_written=len(windows) * (3 * stream + carried) + quantized * packed + sizes.ends_bytes,
        flop=2 * tokens / (training + guard) * work["token passes"] * (sizes.weights + _attention(config, sizes)),
        seconds={} if rates is None else _seconds(config, sizes, work, rates),
    )


def _device_bytes(config: QuantizeConfig, sizes: ModelSizes, blocks: int, width: int) -> dict[str, int]:
    """The largest moment of a window that learns, or of the embeddings and the head, where that is larger."""
    settings, calibration = config.reconstruction, config.calibration
    batch = settings.batch_size * calibration.seq_len
    full = settings.rounding == "full"
    saved = 2 * sizes.outputs + (4 * sizes.hidden if config.scheme.activation_bits else 0)
    window = {
        "weights": blocks * sizes.block_bytes,
        "rounding": blocks * sizes.weights * 2 if full else 0,
        "step sizes": blocks * _scale_bytes(config, sizes, 24),
        "scratch": 2 * width * sizes.largest if full else (10 * 4 * sizes.largest),
        "activations": int(_HEAP * width * batch * ((blocks + 1) * saved + 8 * sizes.hidden)),
    }
    ends = width * sizes.ends + 2 * sizes.vocabulary * sizes.hidden
    head = {"head and logits": width * sizes.ends + _LOGIT_COPIES * 4 * _LOGIT_TOKENS * sizes.vocabulary}
    last = window | (head if settings.head_weight and settings.rounding != "none" else {})
    return max((last, {"embeddings": ends}), key=lambda parts: sum(parts.values()))


def _read_ahead(config: QuantizeConfig, sizes: ModelSizes) -> dict[str, int]:
    batch = config.reconstruction.batch_size * config.calibration.seq_len * sizes.hidden
    return {"read ahead": 2 * _READ_AHEAD * _STREAM_BYTES * batch}


def _scale_bytes(config: QuantizeConfig, sizes: ModelSizes, each: int) -> int:
    """What is kept for each scale of a block, `each` bytes."""
    size = config.scheme.group_size
    return each * sum(rows * (1 if size is None else columns // size) for rows, columns in sizes.layers)


def _packed_bytes(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """A finished block on disk."""
    codes = sum(rows * -(-columns * config.scheme.num_bits // 32) * 4 for rows, columns in sizes.layers)
    zero_points = 0 if config.scheme.symmetric else _scale_bytes(config, sizes, 1) * config.scheme.num_bits // 8
    rest = sizes.block_bytes - sizes.weights * sizes.stored
    return codes + _scale_bytes(config, sizes, sizes.stored) + zero_points + rest


def _attention(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """What attention multiplies for a token, in weights: half of S keys and half of S values."""
    return config.calibration.seq_len * sizes.hidden


def _work(
    config: QuantizeConfig, sizes: ModelSizes, windows: int, in_window: int, training: int, guard: int
) -> dict[str, float]:
    """How often a segment passes a block, in forward passes and in training steps (three of them), and how many steps there are."""
    settings = config.reconstruction
    epochs = settings.epochs if settings.rounding != "none" else 0
    stride = config.window.size - config.window.overlap
    forward = windows * ((training + guard) * (stride + in_window + stride) + 2 * guard * in_window)
    trained = windows * epochs * training * in_window
    steps = windows * epochs * math.ceil(training / settings.batch_size)
    if settings.end_to_end_epochs and settings.rounding != "none":
        forward += settings.end_to_end_epochs * sizes.num_blocks * (training + 2 * guard)
        trained += settings.end_to_end_epochs * sizes.num_blocks * training
    return {
        "forward": forward,
        "trained": trained,
        "token passes": forward + 3 * trained,
        "steps": steps * in_window,
        "hard batches": 2 * windows * in_window * math.ceil(guard / settings.batch_size),
        "blocks": windows * stride,
    }


def _seconds(config: QuantizeConfig, sizes: ModelSizes, work: Mapping[str, float], rates: Rates) -> dict[str, float]:
    seq_len = config.calibration.seq_len
    products = (work["trained"] + work["forward"] / 3) * seq_len * (sizes.weights + 2 * _attention(config, sizes))
    grids = _GRID_CANDIDATES[config.scheme.symmetric] if config.reconstruction.init == "search" else 1
    weights = (work["steps"] + work["hard batches"] + grids * work["blocks"]) * sizes.weights
    values = (work["trained"] + work["forward"] / 3) * seq_len * _ELEMENTWISE * sizes.outputs
    return {
        "matrix products": products * rates.product,
        "rounding": weights * rates.weight,
        "other elementwise work": values * rates.value,
    }


def smaller_settings(config: QuantizeConfig) -> dict[str, QuantizeConfig]:
    """What a user could ask for instead, by the flag."""
    settings, calibration = config.reconstruction, config.calibration
    others = {}
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        others[f"--batch-size {half}"] = replace(config, reconstruction=replace(settings, batch_size=half))
    if calibration.seq_len > 512:
        half = calibration.seq_len // 2
        others[f"--seq-len {half}"] = replace(config, calibration=replace(calibration, seq_len=half))
    if calibration.num_samples > 32:
        half = calibration.num_samples // 2
        others[f"--num-samples {half}"] = replace(config, calibration=replace(calibration, num_samples=half))
    if config.window.size > 1:
        one = replace(config.window, size=1, overlap=0)
        others["--window-size 1 --overlap 0"] = replace(config, window=one)
    if settings.epochs > 1 and settings.rounding != "none":
        half = settings.epochs // 2
        others[f"--epochs {half}"] = replace(config, reconstruction=replace(settings, epochs=half))
    return others


def measure_rates(config: QuantizeConfig, sizes: ModelSizes, device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of this machine, where the run has its cores for itself.

    Two products of different length with a layer as wide as the model's largest tell apart what a weight takes and what a token takes.
    """
    rows, columns = max(sizes.layers, key=math.prod)
    rows = max(16, min(rows, _MEASURED_WEIGHTS // columns))
    groups = 1 if config.scheme.group_size is None else columns // config.scheme.group_size
    theta_OG = torch.zeros(rows, groups, device=device, requires_grad=True)
    weight = StraightThrough(
        torch.full((rows, columns), 0.1, device=device, dtype=torch.bfloat16),
        torch.full((rows, groups), 0.3, device=device),
        torch.zeros(rows, columns, device=device, dtype=torch.float16),
        -8.0,
        7.0,
        1e-3,
        passes_for(config.reconstruction.kernels, device),
        Scratch(),
    )
    batch = config.reconstruction.batch_size * config.calibration.seq_len
    many = max(4, min(batch, _MEASURED_TOKENS))
    few = many // 4

    def product(tokens: int) -> Callable[[], object]:
        x_TI = torch.ones(tokens, columns, device=device, dtype=dtype, requires_grad=True)
        g_TO = torch.ones(tokens, rows, device=device, dtype=dtype)
        return lambda: torch.autograd.grad(
            straight_through_product(x_TI, theta_OG, weight, None), (x_TI, theta_OG), g_TO
        )

    gate, up = (torch.ones(many, columns, device=device, dtype=dtype, requires_grad=True) for _ in range(2))

    def elementwise() -> object:
        return torch.autograd.grad(functional.silu(gate) * up, (gate, up), up.detach())

    slow, fast = _timed(product(many), device), _timed(product(few), device)
    a_token = max(0.0, slow - fast) / (many - few)
    return Rates(
        product=a_token / (rows * columns),
        weight=max(0.0, fast - few * a_token) / (rows * columns),
        value=_timed(elementwise, device) / (11 * gate.numel()),  # reads and writes of the two passes
    )


def _timed(work: Callable[[], object], device: torch.device, seconds: float = 1.2) -> float:
    """Median time of a call, from as many as fit; on the CPU, of the cores that it uses, so that other programs do not count."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    cuda = device.type == "cuda"
    clock, cores = (time.perf_counter, 1) if cuda else (time.process_time, torch.get_num_threads())
    work()
    while not times or time.perf_counter() < end:
        began = clock()
        work()
        if cuda:
            torch.cuda.synchronize(device)
        times.append((clock() - began) / cores)
    return sorted(times)[len(times) // 2]


def plan_run(config: QuantizeConfig, *, with_time: bool) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The plan of a run, and of those with smaller settings by the flags that ask for them, as plain values.

    Raises:
        InputError: the model cannot be read.
        UsageError: the settings do not fit it.
    """
    sizes = ModelSizes.of(Path(config.model))
    device, rates = choose_device(config.device), None
    if with_time:
        make_deterministic(config.threads)
        rates = measure_rates(config, sizes, device, compute_dtype(device))

    def made(which: QuantizeConfig) -> dict[str, Any]:
        return make_plan(which, sizes, device.type, rates).to_dict()

    return made(config), {flags: made(other) for flags, other in smaller_settings(config).items()}
