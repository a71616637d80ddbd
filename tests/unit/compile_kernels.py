"""Compile the Triton kernels for a GPU that is not there, and print a JSON object with facts about each variant.

Usage: compile_kernels.py SM [--all]

With --all, weights in fp16 and float32, more group sizes and more ranks are compiled too.

The functions of `signround_triton.py` and `lora_triton.py` are called with tensors on the CPU, and every launch is replaced by a
compilation, so that exactly the variants that would be launched are compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cbqstream.numerics.affine import Bound
from cbqstream.rounding import lora_triton, search_triton, signround_triton
from cbqstream.rounding.lora_kernels import LowRankWeight
from cbqstream.scheme import Scheme

ROWS = 64
SHAPES = {"16": (16, 8), "128": (128, 8), "channel": (4096, 1), "unaligned": (1001, 1)}
"""Columns of a group and number of groups. The rows of an unaligned weight do not begin at a multiple of 16 bytes."""
MORE_SHAPES = {"32": (32, 8), "64": (64, 8), "256": (256, 8)}
SEARCHED = ("128", "channel")
"""Shapes for which the search is compiled. Its kernel has loops, and compiles slowly."""
DTYPES, MORE_DTYPES = (torch.bfloat16,), (torch.float16, torch.float32)


class PretendDriver:
    """What Triton asks the driver of a device for before it compiles a kernel.

    Args:
        sm: compute capability, such as 90.
    """

    def __init__(self, sm: int) -> None:
        self.target = GPUTarget("cuda", sm, 32)

    def get_current_device(self) -> int:
        """Number of the device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Handle of the stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Architecture of the device."""
        return self.target


def signround(w: torch.Tensor, scale: torch.Tensor, bounds: tuple[Bound, Bound]) -> None:
    """Launch the kernels of signround."""
    v, gradient = w.half(), torch.zeros_like(w)
    signround_triton.forward(w, scale, v, *bounds, gradient)
    signround_triton.backward_update(w, scale, v, *bounds, gradient, 0.01)


def lora_rounding(w: torch.Tensor, scale: torch.Tensor, bounds: tuple[Bound, Bound], rank: int = 5) -> None:
    """Launch the kernels of lora_rounding."""
    weight = LowRankWeight(w, scale, scale, torch.zeros(ROWS, rank), torch.zeros(rank, w.shape[1]), *bounds)
    lora_triton.forward(weight, w)
    lora_triton.backward(weight, w, 4.0, 0.01)


def search(w: torch.Tensor, scale: torch.Tensor, bounds: tuple[Bound, Bound]) -> None:
    """Launch the kernel of the search of a grid."""
    groups = scale.shape[1]
    scheme = Scheme(
        num_bits=4,
        group_size=None if groups == 1 else w.shape[1] // groups,
        symmetric=not isinstance(bounds[0], torch.Tensor),
    )
    search_triton.search_grid(w, torch.ones(w.shape[1]), scheme)


def variants(*, everything: bool) -> Iterator[tuple[str, list[object]]]:
    """Name of each variant and the compiled kernels of a forward and a backward pass."""
    compiled: list[object] = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    def kernels_of(launch: Callable[..., None], size: int, number: int, dtype: torch.dtype, *, symmetric: bool, **more):
        w, scale = torch.zeros(ROWS, size * number, dtype=dtype), torch.ones(ROWS, number)
        compiled.clear()
        launch(w, scale, (-8.0, 7.0) if symmetric else (-scale, scale), **more)
        return list(compiled)

    JITFunction.run = compile_only
    dtypes, shapes = (DTYPES + MORE_DTYPES, SHAPES | MORE_SHAPES) if everything else (DTYPES, SHAPES)
    for dtype, (name, shape), symmetric in product(dtypes, shapes.items(), (True, False)):
        variant = f"{dtype}, {name}, {'symmetric' if symmetric else 'asymmetric'}"
        yield f"signround, {variant}", kernels_of(signround, *shape, dtype, symmetric=symmetric)
        if name in SEARCHED:
            yield f"search, {variant}", kernels_of(search, *shape, dtype, symmetric=symmetric)
        if symmetric or (everything and dtype in DTYPES):
            yield f"lora_rounding, {variant}", kernels_of(lora_rounding, *shape, dtype, symmetric=symmetric)
    for rank in (1, 8, 64) if everything else ():
        made = kernels_of(lora_rounding, *SHAPES["128"], torch.bfloat16, symmetric=True, rank=rank)
        yield f"lora_rounding, rank {rank}", made


def facts(kernel: object) -> dict[str, int]:
    """Registers of a thread, bytes of its stack and local memory, and numbers of instructions of a compiled kernel.

    `partial sums` is 1 if all that the kernel writes is sums, of which a thread has single values.
    """
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    patterns = {
        "wide loads": r"ld\.global\S*\.v4\.b32",
        "wide stores": r"st\.global\S*\.v4\.b32",
        "narrow": r"(?:ld|st)\.global\S*\.b16",
        "fused": r"fma\.rn\.f32",
        "atomic": r"\s(?:atom|red)\.",
    }
    found["partial sums"] = int(kernel.name == "_backward_kernel")
    return found | {name: len(re.findall(pattern, ptx)) for name, pattern in patterns.items()}


if __name__ == "__main__":
    driver.set_active(PretendDriver(int(sys.argv[1])))
    found = variants(everything="--all" in sys.argv)
    print(json.dumps({name: [facts(kernel) for kernel in both] for name, both in found}))
