#!/usr/bin/env python3
"""Trace a training step of one window on meta tensors, compared with the plan: launches, bytes, floating-point operations, peak memory.

Usage: trace_step.py [SHAPE ...] [--batch 1 4] [--rounding signround lora_rounding] [--checkpointing no yes] [--kernels auto]
                     [--group-size 128] [--print] [--results FILE]

SHAPE is the shape of a Llama block, see `bench_window.py`. The window is read, started and trained by the code of the package, on tensors
without values: nothing is computed, and no GPU is needed. See `tracing.py` for what that leaves out. The step is the second of two. Seconds
are those of a roofline: products at the speed of the tensor cores or of the memory, whichever takes longer, and all other operators at the
speed of the memory.
"""

import argparse
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from bench_window import SHAPES, VOCABULARY, RandomWeights, Shape
from measure import load, save
from torch import Tensor
from torch.optim import Adam
from torch.utils._pytree import tree_map
from tracing import META, Tracer, tracing, within

from cbqstream.activations.memory_store import MemoryStore
from cbqstream.activations.store import StreamShape
from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.config import CalibrationConfig, QuantizeConfig, ReconstructionConfig
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.models.meta_model import MetaModel
from cbqstream.numerics.scale_search import search_grid
from cbqstream.planning.memory import device_bytes
from cbqstream.planning.sizes import ModelSizes
from cbqstream.records import Compute, MemoryMode
from cbqstream.rounding.registry import METHODS
from cbqstream.rounding.rounding import Rounding
from cbqstream.runtime.device import fixed_numerics
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.windows import reconstruct as reconstruction
from cbqstream.windows.propagate import propagate
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.read_block import read_block
from cbqstream.windows.resident_block import BlockSettings, ResidentBlock

RESULTS = Path(__file__).resolve().parent / "results" / "trace.json"
GIB = 1 << 30
DEVICES = {"H100": (600e12, 2.7e12), "RTX 4090": (140e12, 0.92e12)}
"""Floating-point operations of products and bytes of device memory per second that are assumed."""


class MetaWeights(RandomWeights):
    """A source of weights that are zeros, or have no values on the meta device."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Tensors by name, with their sizes."""
        found = super().infos().items()
        return {name: replace(info, end=2 * math.prod(info.shape)) for name, info in found}

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`."""
        return torch.zeros(self._shapes[name], device=device, dtype=dtype or torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A training step that is traced."""

    shape: str
    batch: int
    rounding: str
    checkpointing: bool
    kernels: str = "auto"
    seq_len: int = 2048
    group_size: int | None = 128
    blocks: int = 2
    scheme: str = "W4A16"

    @property
    def name(self) -> str:
        """Name of the row of results."""
        options = [f"{self.kernels} kernels"] * (self.kernels != "auto") + ["checkpointing"] * self.checkpointing
        scheme = [self.scheme] * (self.scheme != "W4A16")
        return ", ".join([self.shape, f"{self.batch} x {self.seq_len}", *scheme, self.rounding, *options])

    def config(self) -> QuantizeConfig:
        """The settings of a run with this step; every epoch has one step."""
        settings = ReconstructionConfig(
            rounding=self.rounding, batch_size=self.batch, epochs=2, kernels=self.kernels, init="minmax"
        )
        return QuantizeConfig(
            model="MODEL",
            out="OUT",
            scheme=Scheme.named(self.scheme, group_size=self.group_size),
            calibration=CalibrationConfig(dataset="D", num_samples=self.batch, seq_len=self.seq_len),
            reconstruction=settings,
        )

    @property
    def memory_mode(self) -> MemoryMode:
        """Memory mode of the step."""
        return MemoryMode(activation_checkpointing=self.checkpointing)


@dataclass(frozen=True)
class Traced:
    """What a window was found to do."""

    launches: Counter[str]
    """Kernels that a training step starts, by kind."""
    moved: Counter[str]
    """Bytes that it reads and writes, by kind."""
    flop: Counter[str]
    """Floating-point operations of its products, by kind."""
    peaks: dict[str, Counter[str]]
    """Largest memory of tensors in each phase of the window, by part."""
    reserved: int = 0
    """Memory that the caching allocator holds at the end, bytes."""

    def seconds_of_products(self, device: str) -> float:
        """Seconds of the matrix products and of attention in the roofline of a device."""
        products, memory = DEVICES[device]
        return sum(max(self.flop[kind] / products, self.moved[kind] / memory) for kind in ("products", "attention"))

    def seconds(self, device: str) -> float:
        """Seconds of the roofline of a device."""
        others = (moved for kind, moved in self.moved.items() if kind not in ("products", "attention"))
        return self.seconds_of_products(device) + sum(others) / DEVICES[device][1]


def blocks_of(case: Case, shape: Shape, settings: BlockSettings, compute: Compute) -> list[ResidentBlock]:
    """Blocks of a window that have just been read."""
    source = MetaWeights(shape, case.blocks)
    meta_model = MetaModel(Path("random"), shape.config(case.blocks), source.infos())
    tokens = torch.arange(case.seq_len) % VOCABULARY
    cpu = torch.device("cpu")
    with load_embedding_and_head(meta_model, source, device=cpu, dtype=compute.dtype) as outer:
        arguments = outer.block_arguments(tokens)
    made = []
    for index, called in enumerate(arguments):
        on_meta = tree_map(lambda value: value.to(META) if isinstance(value, Tensor) else value, dict(called.values))
        schemes = dict.fromkeys(meta_model.blocks[index].linears, settings.scheme)
        moved = replace(called, values=on_meta)
        made.append(read_block(meta_model, index, source, schemes, moved, compute, settings.scratch))
    return made


@contextmanager
def _named(tracer: Tracer, steps: list[tuple[Counter[str], ...]]) -> Iterator[None]:
    """Give operators and memory of parts of the package their kind and part, inside a `with`."""

    def optimize(*args, **kwargs):
        with tracer.kind("optimizer"), tracer.part("optimizer"):
            step(*args, **kwargs)
        steps.append(tracer.counts())

    step = Adam.step
    with ExitStack() as stack:
        patch = lambda owner, name, new: stack.enter_context(mock.patch.object(owner, name, new))  # noqa: E731
        patch(Adam, "step", optimize)
        patch(
            reconstruction, "hard_loss", lambda *given: 0.0
        )  # passes over all weights that need less memory than training
        patch(Rounding, "changed", lambda rounding: (0, 1))
        patch(Scratch, "take", within(partial(tracer.part, "scratch"), Scratch.take))
        for method in {Rounding, *METHODS.values()}:
            for name in ("soft_rows", "gradients"):
                if name in vars(method):
                    tagged = within(partial(tracer.part, "tiles"), vars(method)[name])
                    patch(method, name, within(partial(tracer.kind, "rounding"), tagged))
        yield


def trace(case: Case, shape: Shape | None = None) -> Traced:
    """Trace a window: statistics of the inputs, start, and the second of two training steps."""
    shape, config = shape or SHAPES[case.shape], case.config()
    compute = Compute(META, torch.bfloat16, case.batch, case.memory_mode)
    settings = BlockSettings(config.scheme, config.reconstruction, config.transforms)
    steps: list[tuple[Counter[str], ...]] = []
    peaks: dict[str, Counter[str]] = {}
    stream = StreamShape(case.batch, case.seq_len, shape.hidden)
    inputs, targets = MemoryStore(stream), MemoryStore(stream)
    inputs._written = targets._written = set(range(case.batch))  # the values do not matter
    blocks = blocks_of(case, shape, settings, compute)
    with fixed_numerics(torch.device("cpu"), 1), tracing() as tracer, _named(tracer, steps):
        with tracer.part("weights"):
            for block in blocks:
                for tensor in (*block.module.state_dict().values(), *(layer.weight for layer in block.layers.values())):
                    tracer.allocated(tensor)
        for block in blocks:
            block.watch_inputs(case.batch * case.seq_len, settings)
        propagate(blocks, inputs, targets, compute, phase=Phase.ORIGINAL)
        peaks["statistics"] = tracer.peak
        tracer.restart_peak()
        with tracer.part("rounding and step sizes"):
            for block in blocks:
                block.start(settings, torch.Generator().manual_seed(0))
        peaks["start"] = tracer.peak
        tracer.restart_peak()
        tracer.allocator.release()  # the starting scales are those of minmax here, which converts whole layers to float32
        data = reconstruction.WindowData(inputs, targets, compute, config.reconstruction)
        reconstruction.reconstruct(blocks, data, torch.Generator().manual_seed(0), ResidentBlock.state)
        peaks["training"] = tracer.peak
    first, second = steps
    return Traced(
        *(after - before for before, after in zip(first, second, strict=True)), peaks, tracer.allocator.reserved
    )


def sizes_of(case: Case, shape: Shape | None = None) -> ModelSizes:
    """Sizes of the model of a step."""
    shape = shape or SHAPES[case.shape]
    source = MetaWeights(shape, case.blocks)
    return ModelSizes.of(MetaModel(Path("random"), shape.config(case.blocks), source.infos()))


def planned(case: Case, shape: Shape | None = None) -> dict[str, int]:
    """Device memory that the plan counts for a step, by purpose; without that of the context."""
    config = replace(case.config(), reconstruction=replace(case.config().reconstruction, head_weight=0.0))
    return device_bytes(config, sizes_of(case, shape), case.memory_mode, case.blocks, "cuda", {}, {})


def traced_grid_search(scheme: Scheme) -> dict[str, float]:
    """Bytes for each weight that the search of a grid moves and keeps in memory, and kernels that it starts for 2^23 weights.

    Args:
        scheme: the scheme of the layer, of 1,024 x 8,192 weights.
    """
    rows, columns = 1024, 8192
    with fixed_numerics(torch.device("cpu"), 1), tracing() as tracer:
        weight, importance = (torch.empty(*shape, device=META) for shape in ((rows, columns), (columns,)))
        weight = weight.bfloat16()
        before, (launches, moved, _) = tracer.live.total(), tracer.counts()
        tracer.restart_peak()
        search_grid(weight, importance, scheme)
        launches, moved = tracer.launches - launches, tracer.moved - moved
        kept = tracer.peak.total() - before
    return {
        "moved": moved.total() / weight.numel(),
        "kept": kept / weight.numel(),
        "launches": launches.total(),
    }


def row_of(case: Case) -> dict:
    """The row of results of a case."""
    traced = trace(case)
    counts = {name: dict(getattr(traced, name)) for name in ("launches", "moved", "flop")}
    peaks = {phase: dict(+peak) for phase, peak in traced.peaks.items()}
    return {"case": asdict(case), **counts, "peaks": peaks, "reserved": traced.reserved}


def print_tables(rows: dict[str, dict]) -> None:
    """Print tables in Markdown: work and seconds, and memory beside the plan."""
    steps = {name: row for name, row in rows.items() if "case" in row}
    columns = " | ".join(f"seconds, {name} | / products" for name in DEVICES)
    print(f"| step | launches | GB moved | TFLOP | {columns} |")
    print("|" + "---|" * (4 + 2 * len(DEVICES)))
    for name, row in steps.items():
        traced = Traced(*(Counter(row[key]) for key in ("launches", "moved", "flop")), {})
        cells = [f"{traced.launches.total():,}", f"{traced.moved.total() / 1e9:,.1f}"]
        cells.append(f"{traced.flop.total() / 1e12:,.1f}")
        for device in DEVICES:
            seconds = traced.seconds(device)
            cells += [f"{seconds:.3f}", f"{seconds / traced.seconds_of_products(device):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        "\n| device memory, GiB | tensors | segments | planned | planned / tensors | tensors by part | planned parts |"
    )
    print("|" + "---|" * 7)
    for name, row in steps.items():
        peak, plan = row["peaks"]["training"], planned(Case(**row["case"]))
        found, expected = sum(peak.values()), sum(plan.values())
        cells = [f"{size / GIB:.2f}" for size in (found, row["reserved"], expected)]
        cells += [f"{expected / found:.2f}", _parts(peak), _parts(plan)]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| search of a grid | bytes moved for a weight | bytes kept for a weight | launches for 2^23 weights |")
    print("|" + "---|" * 4)
    for name, row in rows.items():
        if "kept" in row:
            print(f"| {name} | {row['moved']:,.0f} | {row['kept']:.1f} | {row['launches']:,} |")


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size > GIB / 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["65b"], help="shapes of a block")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="segments in a training step")
    parser.add_argument("--rounding", nargs="+", default=["signround", "lora_rounding"], help="rounding methods")
    parser.add_argument("--scheme", default="W4A16", help="name of the scheme")
    parser.add_argument("--group-size", type=int, default=128, help="columns that share a scale")
    parser.add_argument("--kernels", nargs="+", default=["auto"], help="kernels of signround: auto or plain")
    parser.add_argument("--checkpointing", nargs="+", default=["no", "yes"], help="activation checkpointing: no or yes")
    parser.add_argument("--print", action="store_true", help="trace nothing, and print the stored rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file for the rows")
    args = parser.parse_args()
    choices = itertools.product(args.shapes, args.batch, args.rounding, args.checkpointing, args.kernels)
    for shape, batch, rounding, checkpointing, kernels in () if args.print else choices:
        case = Case(
            shape, batch, rounding, checkpointing == "yes", kernels, group_size=args.group_size, scheme=args.scheme
        )
        save(args.results, case.name, row_of(case))
    for symmetric in () if args.print else (True, False):
        scheme = Scheme(num_bits=4, group_size=128, symmetric=symmetric)
        save(args.results, f"grid search, {'symmetric' if symmetric else 'asymmetric'}", traced_grid_search(scheme))
    print_tables(load(args.results))


if __name__ == "__main__":
    main()
