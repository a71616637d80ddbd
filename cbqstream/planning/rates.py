"""Speed of this machine, measured in a few seconds on layers with the shapes of a model."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from cbqstream.config import QuantizeConfig
from cbqstream.planning.disk_rates import DiskRates
from cbqstream.rounding.registry import method_of
from cbqstream.rounding.rounding import RoundingStart, TrainingStep
from cbqstream.runtime.scratch import Scratch

STEP_FLOP = 6
"""Floating-point operations of a training step for a weight and a token: three matrix products."""
_MEASURED = {"cpu": (4 << 20, 1024), "cuda": (64 << 20, 8192)}
"""Largest numbers of weights and of tokens of a measured product. On CUDA, kernel launches would dominate the time of smaller products."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Times of elementary operations on this machine, in seconds."""

    product: float
    """Time for one weight, token and training step: output, gradient of the input and gradient of the weight."""
    weight: float
    """Time for one weight and training step that does not depend on the number of tokens: its rounding, twice forward and once backward."""
    value: float
    """Time to read or write one value of the activations."""
    disks: DiskRates | None = None
    """Speed of the disks; None leaves their time out."""


def measure_rates(
    config: QuantizeConfig, layers: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> Rates:
    """Measure the rates of this machine for a run that has all cores to itself.

    Products with two different numbers of tokens separate the time per weight from the time per token. The layer has as many columns as
    the largest layer of the model, and the rounding method of the settings.

    Args:
        config: settings of the run.
        layers: [O, I] of the layers of a block.
        device: device to measure.
        dtype: dtype in which blocks compute.
    """
    weights, tokens = _MEASURED[device.type]
    rows, columns = max(layers, key=math.prod)
    rows = max(16, min(rows, weights // columns))
    groups = 1 if config.scheme.group_size is None else columns // config.scheme.group_size
    start = RoundingStart(
        weight=torch.full((rows, columns), 0.1, device=device, dtype=torch.bfloat16),
        scale=torch.full((rows, groups), 0.3, device=device),
        zero_point=None,
        scheme=replace(config.scheme, symmetric=True),
        config=config.reconstruction,
        generator=torch.Generator().manual_seed(0),
        scratch=Scratch(),
    )
    rounding = method_of(config.reconstruction)(start)
    rounding.begin_step(TrainingStep(progress=0.0, rate_left=1.0, total=1000, num_layers=1))
    batch = config.reconstruction.batch_size * config.calibration.seq_len
    many = max(4, min(batch, tokens))
    few = many // 4

    def product(length: int) -> Callable[[], object]:
        x_TI = torch.ones(length, columns, device=device, dtype=dtype, requires_grad=True)
        g_TO = torch.ones(length, rows, device=device, dtype=dtype)
        learned = rounding.learned_parameters()
        return lambda: torch.autograd.grad(rounding.product(x_TI, None), (x_TI, *learned), g_TO)

    gate, up = (torch.ones(many, columns, device=device, dtype=dtype, requires_grad=True) for _ in range(2))

    def elementwise() -> object:
        return torch.autograd.grad(functional.silu(gate) * up, (gate, up), up.detach())

    slow, fast = _timed(product(many), device), _timed(product(few), device)
    a_token = max(0.0, slow - fast) / (many - few)
    return Rates(
        product=a_token / (rows * columns),
        weight=max(0.0, fast - few * a_token) / (rows * columns),
        value=_timed(elementwise, device)
        / (11 * gate.numel()),  # 11 reads and writes of each value in the forward and backward pass
    )


def _timed(work: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float:
    """Median time of a call in seconds, from the calls that fit into `seconds`, at least one.

    On the CPU it is the process time per core, which does not include the time of other programs.
    """
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
