#!/usr/bin/env python3
"""Measure a training step of one window with random weights, compared with its matrix products alone: seconds, ratio, peak memory.

Usage: bench_window.py SHAPE [--blocks 2] [--batch 4] [--seq-len 512] [--scheme W4A16] [--group-size 64]
                       [--rounding signround|lora_rounding] [--device cpu] [--threads 1] [--steps 5] [--repeats 3] [--name LABEL]
                       [--results FILE] [--kernels plain] [--checkpointing] [--offload FILE] [--cap GIB]

SHAPE is the shape of a Llama block: smollm2, 1b, 7b, 65b or 405b. The step is that of `reconstruct`: soft weights, forward pass, loss,
backward pass, Adam. Its time is the difference between training for 1 and for 1 + STEPS steps, divided by STEPS. The matrix products are
those of the step: for each linear layer the output, the gradient of the weight, and the gradient of the input where the step needs it, and
attention forward and backward. Both are timed in turn, REPEATS times, and the medians are reported. On a CPU the clock is the CPU time of
the process over all its threads, which other programs disturb little.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from measure import save
from torch import Tensor
from torch.nn import functional

from cbqstream.activations.memory_store import MemoryStore
from cbqstream.activations.store import StreamShape
from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.config import ReconstructionConfig, TransformConfig
from cbqstream.disk import Disk, ScratchFile
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.models.meta_model import MetaModel
from cbqstream.records import Compute, MemoryMode
from cbqstream.rounding.registry import METHODS
from cbqstream.runtime.device import compute_dtype, fixed_numerics
from cbqstream.runtime.memory import GIB, peak_resident_bytes, return_large_blocks
from cbqstream.scheme import Scheme
from cbqstream.windows.propagate import propagate
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.read_block import read_block
from cbqstream.windows.reconstruct import WindowData, reconstruct
from cbqstream.windows.resident_block import BlockSettings, ResidentBlock

RESULTS = Path(__file__).resolve().parent / "results" / "window.json"
VOCABULARY = 64
NEED_INPUT_GRADIENT = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""Layers whose input needs a gradient in the first block too. The input of the block itself needs none."""


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama block."""

    hidden: int
    inner: int
    heads: int
    key_heads: int

    def config(self, blocks: int) -> dict:
        """Content of the config.json of a model with this many blocks."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "num_hidden_layers": blocks,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """Shape [O, I] of each weight, by the name of the layer in the block."""
        small = self.hidden // self.heads * self.key_heads
        shapes = {"q": (self.hidden, self.hidden), "k": (small, self.hidden), "v": (small, self.hidden)}
        shapes = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
        return shapes | {
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


SHAPES = {
    "smollm2": Shape(576, 1536, 9, 3),
    "1b": Shape(2048, 8192, 32, 8),
    "7b": Shape(4096, 11008, 32, 32),
    "65b": Shape(8192, 22016, 64, 64),
    "405b": Shape(16384, 53248, 128, 8),
}


class RandomWeights:
    """A source of weights that draws each tensor when it is read."""

    def __init__(self, shape: Shape, blocks: int) -> None:
        self._shapes = {"model.embed_tokens.weight": (VOCABULARY, shape.hidden), "model.norm.weight": (shape.hidden,)}
        for index in range(blocks):
            prefix = f"model.layers.{index}"
            self._shapes |= {f"{prefix}.{name}.weight": size for name, size in shape.linears().items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self._shapes[f"{prefix}.{norm}.weight"] = (shape.hidden,)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Tensors by name, which no file has."""
        known = "BF16", torch.bfloat16
        return {
            name: TensorInfo(name, *known, shape, Path("random"), 0, 2 * prod(shape))
            for name, shape in self._shapes.items()
        }

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`, drawn in bf16 and converted to `dtype`."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=dtype or torch.bfloat16)
        generator = torch.Generator(device).manual_seed(len(name) + sum(shape))
        value = torch.empty(shape, device=device, dtype=torch.bfloat16)
        return value.normal_(0, shape[1] ** -0.5, generator=generator).to(dtype or torch.bfloat16)

    def input_quantizer(self, name: str) -> None:
        """None: the source does not quantize inputs."""


def window(
    shape: Shape, blocks: int, compute: Compute, seq_len: int, settings: BlockSettings, file: ScratchFile | None
) -> tuple[list[ResidentBlock], WindowData]:
    """Blocks that are ready to be trained, and inputs and targets for one batch.

    Args:
        shape: shape of the blocks.
        blocks: number of blocks.
        compute: device, dtype and batch size.
        seq_len: tokens in a segment.
        settings: settings with which the blocks are quantized.
        file: file to which the layers are offloaded; None keeps them in memory.
    """
    source = RandomWeights(shape, blocks)
    meta_model = MetaModel(Path("random"), shape.config(blocks), source.infos())
    tokens = torch.arange(seq_len) % VOCABULARY
    with load_embedding_and_head(meta_model, source, device=compute.device, dtype=compute.dtype) as outer:
        arguments = outer.block_arguments(tokens)
    made = []
    for index in range(blocks):
        schemes = dict.fromkeys(meta_model.blocks[index].linears, settings.scheme)
        made.append(read_block(meta_model, index, source, schemes, arguments[index], compute, settings.scratch, file))
    stream = StreamShape(compute.batch_size, seq_len, shape.hidden)
    inputs, targets = MemoryStore(stream), MemoryStore(stream)
    generator = torch.Generator().manual_seed(0)
    for segment in range(compute.batch_size):
        inputs.write(segment, torch.randn(seq_len, shape.hidden, generator=generator))
    for block in made:
        block.watch_inputs(compute.batch_size * seq_len, settings)
    propagate(made, inputs, targets, compute, phase=Phase.ORIGINAL)
    for block in made:
        block.start(settings, generator)
    return made, WindowData(inputs, targets, compute, ReconstructionConfig())


def matrix_products(shape: Shape, blocks: int, compute: Compute, seq_len: int) -> Callable[[], None]:
    """A function that computes the matrix products of one training step, and nothing else."""
    device, dtype, tokens = compute.device, compute.dtype, compute.batch_size * seq_len
    operands = []
    for name, (rows, columns) in shape.linears().items():
        x, w, g = (
            torch.randn(size, device=device, dtype=dtype)
            for size in ((tokens, columns), (rows, columns), (tokens, rows))
        )
        operands.append((name, x, w, g))
    heads = (compute.batch_size, shape.heads, seq_len, shape.hidden // shape.heads)
    q, k, v, out = (torch.randn(heads, device=device, dtype=dtype) for _ in range(4))

    def multiply() -> None:
        for block in range(blocks):
            for name, x, w, g in operands:
                functional.linear(x, w)
                torch.mm(g.t(), x)
                if block or name in NEED_INPUT_GRADIENT:
                    torch.mm(g, w)
            leaves = [value.requires_grad_() for value in (q, k, v)]
            attention = functional.scaled_dot_product_attention(*leaves, is_causal=True)
            torch.autograd.grad(attention, leaves, out)

    return multiply


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes: wall time on a CUDA device, CPU time of the process on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def compute_of(args: argparse.Namespace, device: torch.device) -> Compute:
    """Device, dtype, batch size and memory mode of the arguments."""
    mode = MemoryMode(activation_checkpointing=args.checkpointing, offload=args.offload is not None)
    return Compute(device, compute_dtype(device), args.batch, mode)


@contextmanager
def training(args: argparse.Namespace, device: torch.device) -> Iterator[Callable[[int], None]]:
    """Provide a function that trains the window of the arguments for a number of steps, inside a `with`."""
    config = ReconstructionConfig(rounding=args.rounding, init="minmax", batch_size=args.batch, kernels=args.kernels)
    scheme = Scheme.named(args.scheme, group_size=None if args.group_size == -1 else args.group_size)
    settings = BlockSettings(scheme, config, TransformConfig(smoothing="never"))
    with ExitStack() as opened:
        file = None if args.offload is None else opened.enter_context(Disk().scratch(args.offload))
        compute = compute_of(args, device)
        blocks, data = window(SHAPES[args.shape], args.blocks, compute, args.seq_len, settings, file)

        def train(steps: int) -> None:
            of_steps = replace(data, config=replace(config, epochs=steps))
            reconstruct(blocks, of_steps, torch.Generator().manual_seed(0), ResidentBlock.state)

        yield train


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    """Time the matrix products and the training step, and return the row of results."""
    multiply = matrix_products(SHAPES[args.shape], args.blocks, compute_of(args, device), args.seq_len)

    def time_products() -> float:
        return seconds(lambda: [multiply() for _ in range(args.steps)], device) / args.steps

    multiply()
    products = [time_products()]
    if device.type == "cuda":  # the operands must not count in the peak of the training step
        products += [time_products() for _ in range(args.repeats)]
        del multiply
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with training(args, device) as train:
        train(1)
        steps = []
        for _ in range(args.repeats):
            if device.type == "cpu":
                products.append(time_products())
            difference = seconds(lambda: train(1 + args.steps), device) - seconds(lambda: train(1), device)
            steps.append(difference / args.steps)
    row = {
        "products": statistics.median(products),
        "step": statistics.median(steps),
        "ratio": statistics.median(steps) / statistics.median(products),
        "peak_rss": peak_resident_bytes(),
        "tokens": args.batch * args.seq_len,
        "threads": args.threads,
    }
    if device.type == "cuda":
        row |= {"device": torch.cuda.get_device_name(device), "peak_vram": torch.cuda.max_memory_allocated(device)}
    return row


def measure_within_cap(args: argparse.Namespace) -> dict:
    """The row of results of `measure`, with the limit of device memory of the arguments."""
    device = torch.device(args.device)
    return_large_blocks(offloading=args.offload is not None)
    with ExitStack() as limited, fixed_numerics(device, args.threads):
        if args.cap is not None:
            share = args.cap * GIB / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
            limited.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
        return measure(args, device)


def name_of(args: argparse.Namespace) -> str:
    """Name of the row of results."""
    sizes = [args.shape, f"{args.blocks} blocks", f"{args.batch} x {args.seq_len}"]
    parts = [*sizes, f"{args.scheme} group {args.group_size}", args.rounding, args.device]
    options = {
        f"{args.kernels} kernels": args.kernels != "auto",
        "activation checkpointing": args.checkpointing,
        "offloaded layers": args.offload is not None,
        f"cap {args.cap or 0:g} GiB": args.cap is not None,
        args.name: bool(args.name),
    }
    return ", ".join([*parts, *(option for option, given in options.items() if given)])


def argument_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, help="shape of a block")
    parser.add_argument("--blocks", type=int, default=2, help="blocks in the window")
    parser.add_argument("--batch", type=int, default=4, help="segments in a training step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a segment")
    parser.add_argument("--scheme", default="W4A16", help="name of the scheme")
    parser.add_argument("--group-size", type=int, default=64, help="columns that share a scale; -1 is per channel")
    trained = [name for name, method in METHODS.items() if method.learns]
    parser.add_argument("--rounding", choices=trained, default="signround", help="rounding method")
    parser.add_argument("--kernels", choices=["auto", "plain"], default="auto", help="kernels of signround")
    parser.add_argument("--checkpointing", action="store_true", help="use activation checkpointing")
    parser.add_argument(
        "--offload", type=Path, metavar="FILE", help="keep one layer in memory, and offload the others to this new file"
    )
    parser.add_argument("--cap", type=float, metavar="GIB", help="limit of device memory, GiB (CUDA only)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed together")
    parser.add_argument("--repeats", type=int, default=3, help="number of timings")
    parser.add_argument("--name", default="", help="label that is added to the name of the row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to which the row is added")
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    row = measure_within_cap(args)
    name, memory = name_of(args), row.get("peak_vram", row["peak_rss"]) / GIB
    times = f"products {row['products']:.3f} s, step {row['step']:.3f} s, ratio {row['ratio']:.2f}"
    print(f"{name}: {times}, peak {memory:.2f} GiB")
    save(args.results, name, row)


if __name__ == "__main__":
    main()
