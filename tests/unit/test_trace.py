"""Traced training steps: counts compared with those by hand, and the plan of device memory and of the grid search compared with traces."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cbqstream.config import CalibrationConfig, ReconstructionConfig
from cbqstream.planning.plan import fitting_plan, make_plan
from cbqstream.planning.rates import Rates
from cbqstream.planning.work import GRID_SEARCH_BYTES
from cbqstream.scheme import Scheme

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
GIB, MIB = 1 << 30, 1 << 20


@pytest.fixture(scope="module")
def trace_step():
    """The module benchmarks/trace_step.py."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("trace_step")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_operators_are_counted_as_by_hand(trace_step):
    with trace_step.tracing() as tracer:
        x, w = (torch.empty(shape, device="meta") for shape in ((64, 256), (256, 128)))
        y = x @ w
        z = y.t().relu()
        z.add_(1.0)
        z.copy_(y.t())
        del y
        u = torch.empty(64, 128, device="meta")
        del z, u
        (x[:, :1].expand(64, 128) + 1).cpu()
    product, values = 4 * (64 * 256 + 256 * 128 + 64 * 128), 4 * 64 * 128
    assert tracer.launches == {"products": 1, "elementwise": 3, "copies": 2}
    assert tracer.flop["products"] == 2 * 64 * 256 * 128
    assert tracer.moved == {"products": product, "elementwise": 4 * values + 4 * 64 + values, "copies": 3 * values}
    assert tracer.peak == {"activations": 4 * (x.numel() + w.numel()) + 2 * values}
    assert tracer.live == {"activations": 4 * (x.numel() + w.numel())}


def test_segments_are_those_of_the_caching_allocator(trace_step):
    allocator = importlib.import_module("tracing").CachingAllocator()
    first, second = allocator.allocate(3 * MIB), allocator.allocate(5 * MIB)
    assert allocator.reserved == 20 * MIB  # one segment for tensors below 10 MiB
    small = allocator.allocate(100)
    assert allocator.reserved == 22 * MIB
    allocator.free(first)
    large = allocator.allocate(13 * MIB)  # 12 MiB are free behind the second tensor and 3 MiB before it
    assert allocator.reserved == 36 * MIB
    allocator.free(second)
    assert allocator.allocate(20 * MIB) is first
    assert allocator.reserved == 36 * MIB
    allocator.free(large)
    allocator.free(small)
    allocator.release()
    assert allocator.reserved == 20 * MIB


@pytest.mark.parametrize(
    "case",
    [
        ("65b", 1, "signround", False),
        ("65b", 4, "signround", True),
        ("1b", 4, "lora_rounding", True),
    ],
    ids=str,
)
def test_planned_device_memory_is_at_most_15_percent_above_the_traced_peak(trace_step, case):
    case = trace_step.Case(*case)
    traced = trace_step.trace(case)
    peak = sum(traced.peaks["training"].values())
    assert peak <= sum(trace_step.planned(case).values()) <= 1.15 * peak
    if not case.checkpointing:  # three products for each weight, and no gradient of the input of the first block
        shapes, tokens = trace_step.SHAPES[case.shape].linears(), case.batch * case.seq_len
        weights = 2 * 3 * sum(rows * columns for rows, columns in shapes.values())
        weights -= sum(
            rows * columns for name, (rows, columns) in shapes.items() if name.endswith(("q_proj", "k_proj", "v_proj"))
        )
        assert traced.flop["products"] == 2 * tokens * weights


@pytest.mark.parametrize("symmetric", [True, False])
def test_planned_grid_search_moves_the_bytes_that_are_traced(trace_step, symmetric, monkeypatch):
    monkeypatch.setattr("cbqstream.numerics.scale_search._ASYMMETRIC_RATIOS", 4)  # 17 ranges instead of 257
    scheme = Scheme(num_bits=4, group_size=128, symmetric=symmetric)
    traced = trace_step.traced_grid_search(scheme)
    assert traced["moved"] * (1 if symmetric else 257 / 17) == pytest.approx(
        GRID_SEARCH_BYTES["plain"][symmetric], rel=0.05
    )
    case = trace_step.Case("65b", 4, "signround", checkpointing=False)
    sizes, rates = trace_step.sizes_of(case), Rates(product=0, weight=0, value=1e-12)
    config = replace(case.config(), scheme=scheme)
    searched = replace(config, reconstruction=replace(config.reconstruction, init="search"))
    plain = replace(searched, reconstruction=replace(searched.reconstruction, kernels="plain"))
    seconds = [make_plan(each, sizes, "cuda", rates).seconds["rounding"] for each in (config, searched, plain)]
    moved = [0, *(GRID_SEARCH_BYTES[kernels][symmetric] for kernels in ("auto", "plain"))]
    assert seconds == pytest.approx([sizes.weights * each * 1e-12 / 2 for each in moved])


@pytest.mark.parametrize(
    ("batch", "ways"),
    [
        (1, {10: "all layers in memory", 9: "activation checkpointing", 8: "layers on disk"}),
        (4, {16: "all layers in memory", 14: "activation checkpointing", 12: "layers on disk"}),
    ],
)
def test_activation_checkpointing_alone_is_chosen_where_it_is_enough(trace_step, batch, ways, monkeypatch):
    """A window of two blocks of 65B has 6 GiB of weights and rounding values, which checkpointing does not reduce."""
    monkeypatch.setattr("cbqstream.planning.plan.available_bytes", lambda: 1 << 40)
    case = trace_step.Case("65b", batch, "signround", checkpointing=False)
    sizes = replace(trace_step.sizes_of(case), num_blocks=80, vocabulary=32000)
    config = replace(
        case.config(),
        calibration=CalibrationConfig(dataset="D", num_samples=128, seq_len=2048),
        reconstruction=ReconstructionConfig(batch_size=batch),
    )
    found = {limit: fitting_plan(replace(config, max_vram=limit * GIB), sizes, "cuda").way for limit in ways}
    assert found == ways
