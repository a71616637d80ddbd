"""Counts of operators on meta tensors: launches, bytes, floating-point operations and live memory, without computing anything.

Meta tensors have shapes and no values, so a step of any size is traced in seconds on any machine. A `Tracer` counts what the code would do
on a CUDA device. It knows nothing of the speed of kernels, of what a kernel allocates for itself, and of fragmentation.
"""

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as nn_functional
from torch.utils._python_dispatch import TorchDispatchMode

from cbqstream.rounding import lora_triton

META = torch.device("meta")
KERNELS = "cbqstream.rounding.signround_triton"
_ALIGNED = 512
"""Size in bytes to whose multiples the caching allocator of torch rounds a tensor."""
_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_local_scalar_dense",
    "_unsafe_view",
    "_reshape_alias",
    "set_",
}
"""Operators besides views that start no kernel."""
_FILLS = {"zeros", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_", "zero_"}
"""Operators that read no tensor."""
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Positions of the two factors of a product among the arguments of an operator."""
_ATTENTION = {"_scaled_dot_product_flash_attention": (0, 4), "_scaled_dot_product_flash_attention_backward": (1, 10)}
"""Position of the query among the arguments, and floating-point operations for a query, a key and a channel of a head."""


@dataclass(eq=False)
class _Block:
    """A part of a segment of device memory, linked with its neighbors."""

    size: int
    small: bool
    before: "_Block | None" = None
    after: "_Block | None" = None


class CachingAllocator:
    """The sizes of the blocks and segments that the caching allocator of torch takes for tensors, with its default settings."""

    def __init__(self) -> None:
        self.reserved = 0
        """Size of all segments in bytes."""
        self._free = list[_Block]()

    def allocate(self, size: int) -> _Block:
        """A block for a tensor: the smallest free one that is large enough, or one in a new segment."""
        size = -(-size // _ALIGNED) * _ALIGNED
        small = size <= 1 << 20
        block = min((each for each in self._free if each.small is small and each.size >= size), default=None, key=_size)
        if block is None:
            least = 2 << 20 if small else 20 << 20 if size < 10 << 20 else size
            block = _Block(-(-least // (2 << 20)) * (2 << 20), small)
            self.reserved += block.size
        else:
            self._free.remove(block)
        if block.size - size >= (_ALIGNED if small else (1 << 20) + 1):
            rest = _Block(block.size - size, small, before=block, after=block.after)
            if rest.after is not None:
                rest.after.before = rest
            block.size, block.after = size, rest
            self._free.append(rest)
        return block

    def release(self) -> None:
        """Give segments back that no tensor is in, as torch does when the device is full."""
        whole = [block for block in self._free if block.before is None and block.after is None]
        self._free = [block for block in self._free if block not in whole]
        self.reserved -= sum(block.size for block in whole)

    def free(self, block: _Block) -> None:
        """Make a block free, and join it with free neighbors."""
        for first, second in ((block, block.after), (block.before, block)):
            other = second if first is block else first
            if first is None or second is None or other not in self._free:
                continue
            self._free.remove(other)
            first.size, first.after = first.size + second.size, second.after
            if first.after is not None:
                first.after.before = first
            block = first
        self._free.append(block)


def _size(block: _Block) -> int:
    return block.size


class Tracer(TorchDispatchMode):
    """Counts inside a `with`. Every count is by kind: `products`, `attention`, `copies`, `elementwise`, or the kind given to `kind`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = Counter[str]()
        """Number of operators that start a kernel."""
        self.moved = Counter[str]()
        """Bytes read and written."""
        self.flop = Counter[str]()
        """Floating-point operations of matrix products and attention."""
        self.live = Counter[str]()
        """Bytes of live tensors, by the part that was current when they were allocated."""
        self.peak: Counter[str] = Counter()
        """`live` when its total was largest."""
        self.allocator = CachingAllocator()
        self._total = self._peak_total = 0
        self._kind: str | None = None
        self._part = "activations"
        self._blocks = dict[int, tuple[_Block, int, str]]()

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self._peak_total = self.live.copy(), self._total

    def counts(self) -> tuple[Counter[str], Counter[str], Counter[str]]:
        """Copies of launches, bytes and floating-point operations so far."""
        return self.launches.copy(), self.moved.copy(), self.flop.copy()

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        """Count operators inside a `with` as of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Count memory that is allocated inside a `with` as of this part."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def count(self, kind: str, moved: int, flop: float = 0, launches: int = 1) -> None:
        """Add an operator."""
        kind = self._kind or kind
        self.launches[kind] += launches
        self.moved[kind] += moved
        self.flop[kind] += flop

    def allocated(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _ALIGNED) * _ALIGNED
        if key in self._blocks or not size:
            return
        self._blocks[key] = self.allocator.allocate(size), size, self._part
        weakref.finalize(storage, self._freed, key).atexit = False
        self.live[self._part] += size
        self._total += size
        if self._total > self._peak_total:
            self.restart_peak()

    def _freed(self, key: int) -> None:
        block, size, part = self._blocks.pop(key)
        self.allocator.free(block)
        self.live[part] -= size
        self._total -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        on_meta = any(tensor.is_meta for tensor in given)
        name = _name(function)
        if on_meta and name == "_local_scalar_dense":  # the value of a meta tensor is not known; any value will do
            return 0.0 if given[0].dtype.is_floating_point else 0
        if on_meta and name == "_to_copy" and kwargs.get("device") == torch.device("cpu"):
            self.count("copies", _nbytes(args[0]))
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if on_meta and (name.endswith("_") or "out" in kwargs):  # no shape changes, so nothing is left to compute
            made = kwargs["out"] if "out" in kwargs else args[0]
        else:
            made = function(*args, **kwargs)
        results = [tensor for tensor in _tensors((made,)) if tensor.is_meta]
        for tensor in results:
            self.allocated(tensor)
        if (on_meta or results) and not function.is_view and name not in _NO_LAUNCH:
            self._operator(name, args, kwargs, given, results)
        return made

    def _operator(self, name: str, args: Any, kwargs: Any, given: list[Tensor], results: list[Tensor]) -> None:
        """Count an operator that starts a kernel."""
        if name in _FILLS:
            given = []
        elif "out" in kwargs:
            given = [tensor for tensor in given if tensor is not kwargs["out"]]
        elif name == "copy_":
            given = given[1:]
        moved = sum(_nbytes(tensor) for tensor in {id(tensor): tensor for tensor in given}.values())
        moved += sum(map(_nbytes, results))
        if name in _PRODUCTS:
            left, right = (args[position] for position in _PRODUCTS[name])
            self.count("products", moved, 2 * left.numel() * right.shape[-1])
        elif name in _ATTENTION:
            position, each = _ATTENTION[name]
            batch, heads, tokens, size = args[position].shape
            self.count("attention", moved, each * batch * heads * tokens**2 / 2 * size)  # half of the pairs: causal
        else:
            self.count("copies" if name in ("_to_copy", "copy_", "clone") else "elementwise", moved)


@functools.cache
def _name(function: Any) -> str:
    """Name of an operator without that of its library."""
    return function._schema.name.partition("::")[2]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _nbytes(tensor: Tensor) -> int:
    """Size in bytes of the different elements of a tensor, which may be expanded."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def _flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """Attention by the operator that CUDA takes for it. The meta device has no fused attention."""
    if attn_mask is not None or not is_causal:
        raise ValueError("this attention is not causal without a mask; CUDA would not take flash attention")
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[0]


def _kernels(tracer: Tracer) -> ModuleType:
    """A module in place of `signround_triton.py` that counts what its kernels move and allocate."""

    def forward(w_OI, scale_OG, v_OI, low, high, out_OI) -> None:
        tracer.count("rounding", sum(map(_nbytes, (w_OI, scale_OG, v_OI, out_OI))))

    def backward_update(w_OI, scale_OG, v_OI, low, high, gradient_OI, step) -> Tensor:
        gradient_OG = torch.empty_like(scale_OG)
        read_and_written = w_OI, scale_OG, v_OI, v_OI, gradient_OI, gradient_OG
        tracer.count("rounding", sum(map(_nbytes, read_and_written)))
        return gradient_OG

    module = ModuleType(KERNELS)
    module.forward, module.backward_update = forward, backward_update
    return module


class _CountedKernel:
    """A Triton kernel that only counts its launch, and the tensors among its arguments once each.

    Args:
        tracer: counts.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            operands = {id(value): value for value in args if isinstance(value, Tensor)}
            self._tracer.count("rounding", sum(map(_nbytes, operands.values())))

        return launch


@contextmanager
def tracing() -> Iterator[Tracer]:
    """Count operators on meta tensors inside a `with`; attention and kernels are those of CUDA."""
    tracer = Tracer()
    real = sys.modules.get(KERNELS)
    sys.modules[KERNELS] = _kernels(tracer)
    kernel = _CountedKernel(tracer)
    try:
        with (
            mock.patch.object(nn_functional, "scaled_dot_product_attention", _flash),
            mock.patch.multiple(lora_triton, _forward_kernel=kernel, _backward_kernel=kernel),
            tracer,
        ):
            yield tracer
    finally:
        del sys.modules[KERNELS]
        if real is not None:
            sys.modules[KERNELS] = real


def within(context: Callable[[], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs inside a context."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return method(*args, **kwargs)

    return wrapped
