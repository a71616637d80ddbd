"""How fast this machine is, measured in a few seconds on layers of a model's shape."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional

from cbqstream.config import QuantizeConfig
from cbqstream.rounding.product import LearnedWeight, learned_product
from cbqstream.rounding.straight_through import StraightThrough, passes_for
from cbqstream.runtime.scratch import Scratch

_MEASURED = {"cpu": (4 << 20, 1024), "cuda": (64 << 20, 8192)}
"""Weights and tokens at most: on CUDA a smaller product takes less time than its launches."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds on this machine."""

    product: float
    """Of a weight, a token and a training step: output, gradient of the input, gradient of the weight."""
    weight: float
    """Of a weight and a training step, whatever the tokens: its rounding, forward twice and backward."""
    value: float
    """Of reading or writing a value of the activations."""


def measure_rates(
    config: QuantizeConfig, layers: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> Rates:
    """The rates of this machine, where the run has its cores for itself.

    Two products of different length with a layer as wide as the model's largest tell apart what a weight takes and what a token takes.
    """
    weights, tokens = _MEASURED[device.type]
    rows, columns = max(layers, key=math.prod)
    rows = max(16, min(rows, weights // columns))
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
    many = max(4, min(batch, tokens))
    few = many // 4

    def place() -> AbstractContextManager[LearnedWeight]:
        return nullcontext(weight)

    def product(length: int) -> Callable[[], object]:
        x_TI = torch.ones(length, columns, device=device, dtype=dtype, requires_grad=True)
        g_TO = torch.ones(length, rows, device=device, dtype=dtype)
        return lambda: torch.autograd.grad(learned_product(x_TI, place, None, theta_OG), (x_TI, theta_OG), g_TO)

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
