"""The stages of gpu_probe.py after the first. Rates are GB/s (1e9 bytes) and TFLOP/s. A stage returns a summary of one line."""

import cProfile
import hashlib
import io
import itertools
import json
import os
import pstats
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_io
import bench_window
import checksums
import random_model
import torch
from gpu_probe import ROOT, Probe
from torch.nn import functional

import tiny as tiny_models
from cbqstream import CalibrationConfig, QuantizeConfig, ReconstructionConfig, Scheme, evaluate, plan, quantize
from cbqstream.activations.memory_store import MemoryStore
from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import StreamShape
from cbqstream.activations.write_behind import write_behind
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.verified import VerifiedCheckpoint
from cbqstream.disk import Disk
from cbqstream.errors import StoppedError
from cbqstream.evaluation import model as evaluation
from cbqstream.models.meta_model import MetaModel
from cbqstream.numerics import scale_search
from cbqstream.packed.layouts import encode
from cbqstream.planning.memory import CONTEXT
from cbqstream.planning.plan import fitting_plan
from cbqstream.planning.sizes import ModelSizes
from cbqstream.records import MemoryMode, QuantizedWeight, WindowReport
from cbqstream.rounding.signround_kernels import PlainKernels
from cbqstream.run import inputs
from cbqstream.rundir.chain import Chain
from cbqstream.runtime.device import fixed_numerics
from cbqstream.runtime.memory import GIB

BF16 = torch.bfloat16


def device_of(probe: Probe) -> torch.device:
    """The CPU, or the one CUDA device."""
    return torch.device("cuda", 0) if probe.device_name == "cuda" else torch.device("cpu")


def wait(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def per_call(probe: Probe, work: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of a call, the mean of several after one that is not counted."""
    work()
    repeats = 1 if probe.small else repeats
    return bench_window.seconds(lambda: [work() for _ in range(repeats)], device_of(probe)) / repeats


def ceilings(probe: Probe) -> str:
    """Rates of a copy on the device, of a large product in bf16, and of transfers between memory and device."""
    device = device_of(probe)
    size, width = (1 << 24, 256) if probe.small else (4 * GIB, 8192)

    def copy() -> float:
        a = torch.ones(size, dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
        return 2 * size / per_call(probe, lambda: b.copy_(a)) / 1e9

    def product() -> float:
        a, b = (torch.randn(width, width, device=device).to(BF16) for _ in range(2))
        return 2 * width**3 / per_call(probe, lambda: torch.mm(a, b), 20) / 1e12

    def transfers() -> dict[str, float]:
        here, found = torch.empty(size // 4, dtype=torch.uint8, device=device), {}
        for kind in ("pageable", "pinned"):
            host = torch.ones(size // 4, dtype=torch.uint8)
            host = host.pin_memory() if kind == "pinned" else host
            for way, to, source in (("to the device", here, host), ("from the device", host, here)):
                work = partial(to.copy_, source, non_blocking=kind == "pinned")
                found[f"{kind}, {way}"] = size // 4 / per_call(probe, work, 4) / 1e9
        return found

    found = {
        "copy, read and written, GB/s": probe.part("copy, read and written, GB/s", copy),
        "product, TFLOP/s": probe.part(f"product of {width}^3 in bf16, TFLOP/s", product),
    }
    moved = probe.part("transfers, GB/s", transfers) if device.type == "cuda" else None
    return f"{rounded(found)}, transfers, GB/s {rounded(moved)}"


def rounded(values: dict[str, Any] | None) -> dict[str, Any]:
    """Values with three digits, for a line."""
    return {
        name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in (values or {}).items()
    }


def kernels(probe: Probe) -> str:
    """The Triton kernels of every variant beside the plain kernels: bits, and rates for weights of a 65B shape."""
    import test_triton as cases

    device = device_of(probe)

    def compared(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, repeats: int = 0) -> dict[str, Any]:
        w, scale, v, bounds, gradient = cases.operands(scheme, shape, dtype)
        both, made = {"plain": PlainKernels(), "Triton": cases.kernels, "again": cases.kernels}, {}
        for name, kernel in both.items():
            w_hat, moved = torch.full_like(w, torch.nan), v.clone()
            kernel.forward(w, scale, v, *bounds, w_hat)
            made[name] = w_hat, moved, kernel.backward_update(w, scale, moved, *bounds, gradient, 0.01)
        exact = cases.theta_gradient(w, scale, v, bounds, gradient)
        size = cases.theta_gradient(w, scale, v, bounds, gradient, absolute=True).clamp(min=1e-30)
        errors = {name: ((theta.double() - exact).abs() / size).max().item() for name, (_, _, theta) in made.items()}
        found = {
            f"other {what}": (made["plain"][index] != made["Triton"][index]).float().mean().item()
            for index, what in enumerate(("w_hat", "v", "theta"))
        }
        found |= {"moved v": (made["Triton"][1] != v).float().mean().item(), "errors of theta": errors}
        right = found["other w_hat"] == found["other v"] == 0 < found["moved v"]
        right = right and all(error <= 1e-5 for error in errors.values())
        twice = all(map(torch.equal, made["Triton"], made["again"]))
        probe.require(right and twice, f"{scheme} {shape} {dtype}: twice the same {twice}, {found}")
        for name in ("plain", "Triton") if repeats else ():
            ahead = partial(both[name].forward, w, scale, v, *bounds, w_hat)
            back = partial(both[name].backward_update, w, scale, v, *bounds, gradient, 1e-3)
            for what, work, num_bytes in (("forward", ahead, 6), ("backward", back, 8)):
                found[f"{name}, {what}"] = num_bytes * w.numel() / per_call(probe, work, repeats) / 1e9
        return found

    # in the interpreter of Triton, which cuts to bf16 what a device rounds, results are float32
    dtypes = (BF16, torch.float32) if device.type == "cuda" else (torch.float32,)
    table, large = {}, (16, 256) if probe.small else (2048, 22016)
    for size, symmetric in ((128, True), (None, True), (32, True), (64, False)):
        scheme = Scheme(num_bits=4, group_size=size, symmetric=symmetric)
        found = probe.part(f"{scheme} {large}, GB/s", partial(compared, scheme, large, dtypes[0], 10))
        rates = {name: value for name, value in (found or {}).items() if name.endswith("ward")}
        table[f"group {size or -1}{'' if symmetric else ', asymmetric'}"] = rounded(rates)
    table |= low_rank_kernels(probe, large) | search_kernel(probe, large)
    for scheme, shape in cases.CASES[:: 8 if probe.small else 1]:
        for dtype in dtypes:
            probe.part(f"{scheme} {shape} {dtype}", partial(compared, scheme, shape, dtype), 3)
    return f"GB/s {table}"


def low_rank_kernels(probe: Probe, shape: tuple[int, int]) -> dict[str, Any]:
    """The kernels of lora_rounding: their rates, and the tests that compare them with the plain ones and with float64."""
    import test_lora_triton as cases

    def rates() -> dict[str, float]:
        dtype = BF16 if device_of(probe).type == "cuda" else torch.float32
        weight, gradient = cases.operands(4, 128, True, shape, 5, dtype)
        found, w_hat = {}, torch.empty_like(weight.w)
        for name, kernels in (("plain", cases.PlainKernels()), ("Triton", cases.kernels)):
            ahead = partial(kernels.forward, weight, w_hat)
            back = partial(kernels.backward, weight, gradient, 3.0, 0.01)
            for what, work in (("forward", ahead), ("backward", back)):
                found[f"{name}, {what}"] = 4 * weight.w.numel() / per_call(probe, work, 10) / 1e9
        return found

    found = probe.part(f"lora_rounding {shape}, GB/s", rates)
    for case in cases.CASES[:: 8 if probe.small else 1]:
        test = cases.test_triton_kernels_equal_the_plain_kernels_and_float64
        probe.part(f"lora_rounding {case}", partial(test, case), 3)
    return {"lora_rounding": rounded(found)}


def search_kernel(probe: Probe, shape: tuple[int, int]) -> dict[str, Any]:
    """Seconds of the search of the grids of a weight, plain and with Triton, and how its errors differ."""
    import test_search_triton as cases

    def both(scheme: Scheme) -> dict[str, float]:
        w = torch.randn(shape, device=device_of(probe)).to(BF16)
        moment, found, errors = torch.rand(shape[1], device=w.device), {}, {}
        for name, search in (("plain", scale_search.search_grid), ("Triton", cases.kernels.search_grid)):
            found[name] = per_call(probe, partial(search, w, moment, scheme), 1)
            errors[name] = cases.weighted_errors(w, moment, search(w, moment, scheme), scheme)
        worse = (errors["Triton"] / errors["plain"]).max().item() - 1
        probe.require(worse < 1e-5, f"search of {scheme}: {worse} worse")
        return found | {"worse": worse}

    schemes = {"": Scheme(num_bits=4), ", per channel": Scheme(num_bits=4, group_size=None)}
    schemes[", asymmetric"] = Scheme(num_bits=4, symmetric=False)
    names = {f"search{about}, s": partial(both, scheme) for about, scheme in schemes.items()}
    return {name: rounded(probe.part(f"{name} of {shape}", work)) for name, work in names.items()}


LAYERS_ON_DISK = MemoryMode(activation_checkpointing=True, offload=True)
SAME_BYTES: dict[str, dict[str, Any]] = {
    "twice": {},
    "stopped": {"stops": (1, 2)},
    "activation-checkpointing": {"mode": MemoryMode(activation_checkpointing=True)},
    "layers-on-disk": {"mode": LAYERS_ON_DISK},
    "streams-on-disk": {"mode": MemoryMode(streams_on_disk=True)},
}
"""Tiny runs that must give the bytes of the first run."""
TINY_CASES: dict[str, dict[str, Any]] = {
    "lora-rounding": checksums.CASES["lora-rounding"],
    "w4a8": {"scheme": Scheme(num_bits=4, group_size=None, activation_bits=8)},
    "paper": {"profile": "paper"},
    "plain-kernels": {"reconstruction": {"kernels": "plain"}},
    "end-to-end": checksums.CASES["end-to-end"],  # of a mixture
}
"""Tiny runs that come before those of checksums.py."""


@contextmanager
def memory_mode(mode: MemoryMode | None) -> Iterator[None]:
    """Have runs inside a `with` use a memory mode; None leaves it to their plans."""
    real = inputs.fitting_plan
    if mode is not None:
        inputs.fitting_plan = lambda *given: replace(real(*given), memory_mode=mode)
    try:
        yield
    finally:
        inputs.fitting_plan = real


@contextmanager
def computing_in_float32(needed: bool) -> Iterator[None]:
    """Have evaluations inside a `with` compute in float32: rounding to bf16 moves many inputs of 4 bits to another level."""
    real = evaluation.compute_dtype
    if needed:
        evaluation.compute_dtype = lambda device: torch.float32
    try:
        yield
    finally:
        evaluation.compute_dtype = real


def different_files(probe: Probe, expected: Path, found: Path) -> list[str]:
    """Names of the files that differ in two results; there must be none."""
    files, others = (tiny_models.files_of(folder) for folder in (expected, found))
    differ = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
    probe.require(bool(files) and not differ, f"{found.name}: other bytes in {differ}")
    return differ


def tiny(probe: Probe) -> str:
    """Whole runs of tiny models: the same bytes twice, after a stop and in every memory mode; perplexity with other settings."""
    folder, device, seq_len = probe.work / "tiny", probe.device_name, tiny_models.SEQ_LEN
    folder.mkdir()
    families = ("llama", "qwen3", "qwen3_moe", "mixtral")
    models = {name: tiny_models.save_model(folder / f"model-{name}", name) for name in families}
    tokens = tiny_models.save_tokens(folder / "tokens.npy", 16 * seq_len)

    def run(name: str, case: dict[str, Any], on: str = device, stop: int | None = None) -> Path:
        config = replace(checksums.config_of(folder, name, case, models), device=on)
        return quantize(config, stop_after_window=stop)

    def measured(name: str, case: dict[str, Any], on: str = device) -> dict[str, Any]:
        with memory_mode(LAYERS_ON_DISK if case.get("offload") else None):
            out = run(name, case, on)
        how = {"num_samples": 8, "seq_len": seq_len, "batch_size": 4, "threads": 1}
        with computing_in_float32(case.get("profile") == "paper" and "scheme" in case):  # inputs of 4 bits
            values = {each: evaluate(out, tokens, device=each, **how).perplexity for each in sorted({device, "cpu"})}
        probe.require(max(values.values()) < 1.06 * min(values.values()), f"{name}: perplexity {values}")
        reports = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses = [(each["loss_before"], each["loss_after"], each.get("reverted")) for each in reports]
        return {"perplexity": values[device], "perplexities": values, "losses": losses}

    def same(name: str, mode: MemoryMode | None = None, stops: tuple[int, ...] = ()) -> list[str]:
        with memory_mode(mode):
            for windows in stops:
                with suppress(StoppedError):
                    run(name, {}, stop=windows)
                done = Chain.read(folder / f"{name}.run").next_window
                probe.require(done == windows, f"{name}: {done} windows are done after stopping at {windows}")
            return different_files(probe, folder / "signround", run(name, {}))

    found = {"CPU": probe.part("quantized on the CPU", partial(measured, "CPU", {}, "cpu"))}
    found["signround"] = probe.part("signround", partial(measured, "signround", {}))
    for name, options in SAME_BYTES.items():
        probe.part(f"{name}, files that differ", partial(same, name, **options), 5)
    for name, case in (TINY_CASES if probe.small else TINY_CASES | checksums.CASES).items():
        found[name] = found.get(name) or probe.part(name, partial(measured, name, case), 6)
    values = {name: row["perplexity"] for name, row in found.items() if row}
    own = {values[name] for name in ("CPU", "signround", "plain-kernels") if name in values}
    probe.require(max(own, default=0) <= 1.04 * min(own, default=0), f"perplexities {own}")  # see test_gpu.py
    return f"perplexity {rounded(values)}"


def products(probe: Probe) -> str:
    """Products with slabs whose numbers of rows are aligned and not, and attention with and without a mask, forward and backward."""
    device = device_of(probe)
    tokens, heads, seq_len = (16, 2, 32) if probe.small else (2048, 64, 2048)

    def slab(rows: int, columns: int) -> dict[str, float]:
        x, w, y = (
            torch.randn(size, device=device).to(BF16) for size in ((tokens, columns), (rows, columns), (tokens, 8192))
        )
        at, gradient, gradient_x = slice(rows, 2 * rows), torch.empty_like(w), torch.zeros_like(x)

        def forward() -> None:
            y[..., at] = functional.linear(x, w)

        each = {
            "output": forward,
            "gradient of the input": lambda: gradient_x.addmm_(y[:, at], w),
            "gradient of the weight": lambda: torch.mm(y[:, at].t(), x, out=gradient),
        }
        return {name: 2 * tokens * w.numel() / per_call(probe, work) / 1e12 for name, work in each.items()}

    def attention(**options: Any) -> dict[str, Any]:
        size = (1, heads, seq_len, 128)
        *leaves, out = (torch.randn(size, device=device).to(BF16).requires_grad_() for _ in range(4))

        def forward() -> torch.Tensor:
            return functional.scaled_dot_product_attention(*leaves, **options)

        def both() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(forward(), leaves, out.detach())

        same = all(torch.equal(a, b) for a, b in zip(both(), both(), strict=True))
        probe.require(same, f"attention {[*options]}: not the same bits twice")
        return {"kind": type(forward().grad_fn).__name__, "ms": 1e3 * per_call(probe, both), "same twice": same}

    table = {}
    with fixed_numerics(device):
        for unaligned, columns in ((3048, 22016), (2340, 28672), (2269, 29568), (1260, 53248)):
            for rows in (unaligned, *(() if probe.small else (2304, 2048))):
                shape = (rows // 64, columns // 64) if probe.small else (rows, columns)
                found = probe.part(f"slab {rows} x {columns}, TFLOP/s", lambda shape=shape: slab(*shape))
                table[f"{rows} x {columns}"] = found and round(3 / sum(1 / rate for rate in found.values()), 1)
        causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
        masks = {"causal": {"is_causal": True}, "mask": {"attn_mask": causal}}
        masks["sliding window"] = {"attn_mask": causal.triu(-seq_len // 4)}
        seen = {name: probe.part(f"attention, {name}", lambda how=how: attention(**how)) for name, how in masks.items()}
    return f"slabs {table}, attention { ({name: found and rounded(found) for name, found in seen.items()}) }"


def arguments(probe: Probe, shape: str, batch: int, *options: str) -> Namespace:
    """Arguments of bench_window.py for a window of 2048 tokens, or of a small model in a rehearsal."""
    sizes = ["smollm2", "--seq-len", "32"] if probe.small else [shape, "--seq-len", "2048", "--group-size", "128"]
    fixed = ["--batch", str(batch), "--device", str(device_of(probe)), "--threads", str(len(os.sched_getaffinity(0)))]
    return bench_window.argument_parser().parse_args([*sizes, *fixed, *options])


def step_line(row: dict[str, Any] | None) -> str:
    """The result of a window in a few words."""
    if row is None:
        return "failed"
    return f"{row['step']:.3f} s, {row['ratio']:.2f} x products, {row.get('peak_vram', 0) / GIB:.2f} GiB"


def profiled(args: Namespace) -> dict[str, Any]:
    """The third training step of a window under the profiler: a table, number of kernels, and seconds in which the device was busy."""
    from torch.autograd import DeviceType
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.profiler import ProfilerActivity, profile, schedule

    device = torch.device(args.device)
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    profiler = profile(activities=activities, schedule=schedule(wait=1, warmup=1, active=1, repeat=1))

    def next_step(*_: object) -> None:
        wait(device)
        profiler.step()

    with fixed_numerics(device, args.threads), bench_window.training(args, device) as train, profiler:
        hook = register_optimizer_step_post_hook(next_step)
        try:
            train(5)
        finally:
            hook.remove()
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80)
    marks = ("Optimizer.", "ProfilerStep")  # they are drawn on the device, and are no work
    on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in on_device if not e.name.startswith(marks))
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - spans[0][0] if spans else 0.0
    return {"kernels": len(spans), "busy": busy / 1e6, "span": span / 1e6, "table": table.splitlines()}


def window(probe: Probe) -> str:
    """Training steps of windows of 65B shape beside their products, memory, and the share of a step in which the device is idle."""
    lines = {}
    few = ("--steps", "2", "--repeats", "1") if probe.small else ("--steps", "4", "--repeats", "3")
    for name, batch, options in (
        ("batch 1", 1, ("--steps", "5", "--repeats", "2")),
        ("batch 4", 4, ("--steps", "3", "--repeats", "2")),
        ("lora_rounding", 1, ("--rounding", "lora_rounding", *few)),
        ("plain kernels", 1, ("--kernels", "plain", *few)),
    ):
        args = arguments(probe, "65b", batch, *options, *(few if probe.small else ()))
        row = probe.part(name, lambda args=args: bench_window.measure_within_cap(args), 10)
        lines[name] = step_line(row)
        seen = probe.part(f"{name}, profile", lambda args=args: profiled(args), 10) if name != "plain kernels" else None
        if row and seen and seen["kernels"]:
            idle = max(0.0, 1 - seen["busy"] / row["step"])
            lines[name] += f", idle {idle:.0%}, {seen['kernels']} kernels"
    return str(lines)


def host(probe: Probe) -> str:
    """What the CPU does beside the device: reading batches, writing streams, checksums, packing, and weights to the device."""
    folder, device = probe.work / "host", device_of(probe)
    folder.mkdir()
    shape = StreamShape(4, 16, 64) if probe.small else StreamShape(8, 2048, 8192)
    tensors = (2, (64, 128)) if probe.small else (8, (4096, 8192))
    size = shape.num_segments * shape.seq_len * shape.hidden_size * 2
    content = os.urandom(1 << 16) * (1 if probe.small else 4096)
    on_device = torch.randn(shape.seq_len, shape.hidden_size, device=device).to(BF16)

    def rate(size: int, work: Callable[[], object]) -> float:
        return bench_io.rate(size, lambda: (work(), wait(device)))

    def batches(*stores: Any) -> float:
        order = in_batches(range(shape.num_segments), 4)
        return rate(2 * size, lambda: [None for _ in read_batches([*stores, *stores], order, device)])

    def behind(store: Any) -> None:
        with write_behind(store) as write:
            for segment in range(shape.num_segments):
                write(segment, on_device)

    def packing() -> dict[str, float]:
        found, before = {}, torch.get_num_threads()
        rows = 64 if probe.small else 8192
        codes = torch.randint(-8, 8, (rows, 4096), dtype=torch.int8)
        weight = QuantizedWeight(codes, torch.ones(rows, 32), None, Scheme(num_bits=4, group_size=128))
        for threads in {1, before}:
            torch.set_num_threads(threads)
            gbs = bench_io.rate(codes.numel(), lambda: encode(weight, scale_dtype=BF16))
            found[f"{threads} threads"] = 0.8095 / gbs  # 809.5 million weights
        torch.set_num_threads(before)
        return found

    def to_device() -> float:
        infos = read_header(folder / "shard.safetensors")
        source = VerifiedCheckpoint(infos)
        total = sum(info.num_bytes for info in infos.values())
        return rate(total, lambda: [source.read(name, device=device) for name in infos])

    memory, on_disk = MemoryStore(shape), ZarrStore.create(folder / "behind", shape, Disk(), durable=False)
    for segment in range(shape.num_segments):
        memory.write(segment, on_device)
    found: dict[str, Any] = {}
    for name, work in {
        "weights": lambda: bench_io.rates_of_weights(folder, *tensors, 0.1 if probe.small else 2),
        "streams": lambda: bench_io.rates_of_streams(folder, shape),
        "weights, verified, to the device": to_device,
        "batches from memory to the device": lambda: batches(memory),
        "batches from disk to the device": lambda: batches(ZarrStore.open(folder / "stream", shape)),
        "from the device to memory": lambda: rate(size, lambda: behind(MemoryStore(shape))),
        "from the device to disk": lambda: rate(size, lambda: behind(on_disk)),
        "SHA-256": lambda: rate(len(content), lambda: hashlib.sha256(content)),
        "packing, seconds of a block of 65B": packing,
    }.items():
        found[name] = probe.part(name, work)
    return "; ".join(f"{name} {rounded(value) if isinstance(value, dict) else value}" for name, value in found.items())


def checkpoint(probe: Probe, folder: Path, shape: bench_window.Shape, blocks: int) -> int:
    """Write a checkpoint of random weights, small in a rehearsal, and tokens beside it. Returns the size of the weights in bytes."""
    shape = bench_window.Shape(256, 512, 2, 2) if probe.small else shape
    options = {"experts": 0, "heads": shape.heads, "key_value_heads": shape.key_heads, "vocabulary": 512, "real": None}
    sizes = Namespace(hidden=shape.hidden, inner=shape.inner, blocks=blocks, **options)
    random_model.random_tokens(folder / "tokens.npy", 512, 16 * seq_len_of(probe))
    return random_model.write_checkpoint(folder / "model", sizes)


def seq_len_of(probe: Probe) -> int:
    """Tokens of a segment in the stages `run` and `kill`."""
    return 32 if probe.small else 2048


def run(probe: Probe) -> str:
    """One window of a checkpoint of two blocks of 65B shape: seconds of each phase, and the slowest functions of the main thread."""
    folder, device = probe.work / "run", device_of(probe)
    folder.mkdir()
    if not probe.part("checkpoint, bytes", lambda: checkpoint(probe, folder, bench_window.SHAPES["65b"], 2)):
        return "no checkpoint"
    config = QuantizeConfig(
        model=str(folder / "model"),
        out=str(folder / "out"),
        scheme=Scheme(num_bits=4, group_size=128),
        calibration=CalibrationConfig(dataset=str(folder / "tokens.npy"), num_samples=16, seq_len=seq_len_of(probe)),
        reconstruction=ReconstructionConfig(epochs=1),
        device=probe.device_name,
    )
    events: list[tuple[float, Any]] = []

    def listen(event: Any) -> None:
        wait(device)
        events.append((time.perf_counter(), event))

    def whole() -> dict[str, Any]:
        with cProfile.Profile() as profiler:
            listen("starting")
            quantize(config, listen)
            listen("ended")
        text = io.StringIO()
        found = pstats.Stats(profiler, stream=text)
        found.sort_stats("cumtime").print_stats("cbqstream/", 50)
        found.strip_dirs().sort_stats("tottime").print_stats(30)
        said = [(at, event) for at, event in events if isinstance(event, str)]
        phases = [(event, until - at) for (at, event), (until, _) in itertools.pairwise(said)]
        reports = [event.to_dict() for _, event in events if isinstance(event, WindowReport)]
        return {"phases": phases, "reports": reports, "main thread": text.getvalue().splitlines()}

    def expected() -> dict[str, Any]:
        made = plan(config)
        return {"seconds": made.seconds, "ram": made.largest("ram"), "vram": made.largest("vram"), "mode": made.way}

    probe.part("plan", expected)
    found = probe.part("16 segments, one epoch", whole)
    if found is None:
        return "failed"
    costs = found["reports"][0]["costs"]
    times = {event.rpartition(": ")[2]: round(spent, 2) for event, spent in found["phases"]}
    return f"{times}, reading {costs['reading']:.1f} s, writing {costs['writing']:.1f} s, {costs['peak_vram'] / GIB:.2f} GiB"


def kill(probe: Probe) -> str:
    """A run that is ended by SIGKILL in its second window and resumed gives the same bytes as one that is not."""
    folder, program = probe.work / "kill", [sys.executable, "-m", "cbqstream"]
    folder.mkdir()
    checkpoint(probe, folder, bench_window.Shape(2048, 8192, 16, 16), 3)  # heads of 128 channels
    sizes = ["--dataset", str(folder / "tokens.npy"), "--num-samples", "16", "--seq-len", str(seq_len_of(probe))]
    sizes += ["--epochs", "4" if probe.small else "20", "--device", probe.device_name]
    commands = {name: ["quantize", str(folder / "model"), str(folder / name), *sizes] for name in ("whole", "killed")}

    def finish(*command: str) -> float:
        began = time.monotonic()
        made = subprocess.run([*program, *command], capture_output=True, text=True, timeout=probe.left, check=False)
        if made.returncode:
            raise RuntimeError(f"exit code {made.returncode}: {made.stderr[-2000:]}")
        return time.monotonic() - began

    def killed() -> dict[str, Any]:
        path = folder / "killed.run"
        process = subprocess.Popen([*program, *commands["killed"]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while not any(path.glob("commits/0*")) and process.poll() is None:
                time.sleep(0.02)
            time.sleep(0.1)
        finally:
            process.kill()
            error = process.communicate()[1]
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"exit code {process.returncode} before SIGKILL: {error[-2000:].decode()}")
        return {"windows": Chain.read(path).next_window, "finished": (folder / "killed").exists()}

    def resumed() -> list[str]:
        finish("resume", str(folder / "killed.run"))
        return different_files(probe, folder / "whole", folder / "killed")

    spent = probe.part("not killed, seconds", lambda: finish(*commands["whole"]))
    left = probe.part("killed", killed)
    differ = probe.part("files that differ after resuming", resumed) if spent and left else None
    return f"killed after {left}, files that differ {differ}"


def cap(probe: Probe) -> str:
    """Windows under limits of device memory, in the memory mode that a plan chooses for the limit, and a window of 405B shape."""
    lines = {}

    def planned(shape: str, batch: int, limit: int) -> Any:
        known = bench_window.SHAPES[shape]
        infos = bench_window.RandomWeights(known, 2).infos()
        config = QuantizeConfig(
            model="random",
            out="random-out",
            scheme=Scheme(num_bits=4, group_size=128),
            calibration=CalibrationConfig(dataset="random", num_samples=128, seq_len=2048),
            reconstruction=ReconstructionConfig(batch_size=batch),
            max_vram=limit * GIB,
        )
        return fitting_plan(config, ModelSizes.of(MetaModel(Path("random"), known.config(2), infos)), "cuda")

    def limited(shape: str, batch: int, limit: int) -> dict[str, Any]:
        chosen = planned(shape, batch, limit)
        options = ["--steps", "2", "--repeats", "1"]
        options += ["--checkpointing"] if chosen.memory_mode.activation_checkpointing else []
        options += ["--offload", str(probe.work / f"layers-{limit}")] if chosen.memory_mode.offload else []
        if probe.device_name == "cuda":  # the limit of torch does not count the context
            options += ["--cap", f"{limit - CONTEXT / GIB:.3f}"]
        row = bench_window.measure_within_cap(arguments(probe, shape, batch, *options))
        return row | {"memory mode": chosen.way, "planned": chosen.largest("vram") / GIB}

    for shape, batch, limit, need in (
        ("65b", 1, 12, 15),
        ("65b", 4, 24, 15),
        ("405b", 1, 60, 35),
        ("65b", 4, 16, 15),
        ("65b", 1, 8, 40),
    ):
        name = f"{shape}, batch {batch}, {limit} GiB"
        row = probe.part(name, lambda now=(shape, batch, limit): limited(*now), need)
        lines[name] = f"{step_line(row)}, planned {row['planned']:.2f}, {row['memory mode']}" if row else "no result"
    return str(lines)


def tests(probe: Probe) -> str:
    """The tests with the marker gpu; without a device they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "tests/integration/test_gpu.py"]

    def run_tests() -> list[str]:
        limit = max(1.0, probe.left - 2)
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        probe.require(made.returncode == 0, f"pytest: exit code {made.returncode}")
        return (made.stdout + made.stderr).splitlines()

    return (probe.part("pytest", run_tests) or ["no result"])[-1]
