"""A pretend CUDA device: tensors that say `cuda:0`, compute on the CPU, and refuse what a CUDA device refuses.

`PretendDevice` makes torch report a CUDA device inside a `with`. The rules are those of the documentation of torch: tensors of two devices
do not meet, generators belong to their device, memory of the device is not seen by numpy, and operations without a deterministic order
raise an error in deterministic mode. It counts what makes the host wait for the device, and how attention is computed. It does not
compute as a GPU does, and knows nothing of its memory and speed.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cbqstream.rounding import (
    lora_kernels,
    lora_triton,
    search_kernels,
    search_triton,
    signround_kernels,
    signround_triton,
)

DEVICE = torch.device("cuda:0")
_COPIES = {"_to_copy", "copy_"}
"""Operations whose operands may be on two devices."""
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "masked_select",
    "equal",
    "bincount",
    "is_nonzero",
}
"""Operations whose result the host needs before it can go on."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_UNORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "histc": lambda args, kwargs: True,
    "kthvalue": lambda args, kwargs: True,
    "put_": lambda args, kwargs: True,
    "nll_loss2d_forward": lambda args, kwargs: True,
    "cumsum": lambda args, kwargs: (kwargs.get("dtype") or args[0].dtype).is_floating_point,
    "cumsum_": lambda args, kwargs: (kwargs.get("dtype") or args[0].dtype).is_floating_point,
    "bincount": lambda args, kwargs: len(args) > 1 and args[1] is not None,
}
"""Operations that have no deterministic order on CUDA, and a function of their arguments that says whether that holds for a call."""


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device. `inner` holds its values on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",  # for autograd, which has no CUDA here; Python sees the property `device`
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _active().compute(function, args, kwargs or {})

    def __repr__(self) -> str:
        return f"PretendTensor({self.inner})"

    def tolist(self):
        _active().waits["tolist", _place()] += 1
        return self.inner.tolist()

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def pin_memory(self, *devices):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def cpu(self, *options):
        return self.to("cpu")

    def to(self, *args, copy=False, **kwargs):
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and not on_device(device):
            with _active().leaving():
                return torch.ops.aten._to_copy.default(self, dtype=dtype, device=device)
        made = super().to(self.dtype if dtype is None else dtype)
        return made.clone() if copy and made is self else made

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True


class PretendDevice:
    """The device inside a `with`, see `running`, and what it counted."""

    def __init__(self) -> None:
        self.waits = Counter[tuple[str, str]]()
        """Number of times that the host waited for the device, by operation and by the place in the package."""
        self.attention = Counter[str]()
        """Number of calls of fused attention, by `causal` or by the reason why flash attention does not compute it."""
        self.operations = 0
        """Number of operations on the device."""
        self.pinned = set[int]()
        """Addresses of pinned memory."""
        self.composing = False
        """Whether attention is being computed by other operations of torch."""
        self._leaving = False

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Have copies go to the CPU inside a `with`.

        Operations of torch also pass on the device of an operand, which is "cpu" for them. Their results stay on the device.
        """
        self._leaving = True
        try:
            yield
        finally:
            self._leaving = False

    def compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Result of an operation of which an operand or the result is on the device."""
        name = function._schema.name.partition("::")[2]
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
        self.operations += 1
        self._check(name, leaves, ours, args, kwargs)
        self._count(name, args, kwargs, ours)
        wrappers = {id(leaf.inner): leaf for leaf in ours}
        onto = not self._leaving if ours else on_device(kwargs["device"])
        plain = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
        if "device" in kwargs:
            meta = kwargs["device"] is not None and torch.device(kwargs["device"]).type == "meta"
            onto, plain["device"] = onto and not meta, torch.device("meta" if meta else "cpu")
        made = function(*tree_map(_inner, args), **tree_map(_inner, plain))

        def placed(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, PretendTensor) or not onto:
                return value
            return wrappers[id(value)] if id(value) in wrappers else PretendTensor(value)

        return args[0] if name == "copy_" else tree_map(placed, made)

    def _check(self, name: str, leaves: list[torch.Tensor], ours: list[Any], args: Any, kwargs: Any) -> None:
        """Refuse what a CUDA device refuses."""
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu' ({_place()})")
        others = [leaf for leaf in leaves if not isinstance(leaf, PretendTensor)]
        if ours and name not in _COPIES:
            meeting = [leaf for leaf in others if leaf.dim() and not (name in _INDEXING and leaf is not args[0])]
            if meeting:
                shapes = [tuple(leaf.shape) for leaf in meeting]
                raise RuntimeError(
                    f"{name}: expected all tensors to be on the same device, but {shapes} are on cpu ({_place()})"
                )
        if torch.are_deterministic_algorithms_enabled() and name in _UNORDERED and _UNORDERED[name](args, kwargs):
            raise RuntimeError(f"{name} does not have a deterministic implementation on CUDA ({_place()})")

    def _count(self, name: str, args: Any, kwargs: Any, ours: list[Any]) -> None:
        """Count an operation for which the host waits."""
        if name in _WAITS and ours:
            self.waits[name, _place()] += 1
        elif name in _INDEXING:
            indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.waits["index with bool", _place()] += 1
            elif not all(isinstance(index, PretendTensor) for index in indices):
                self.waits["index on the CPU", _place()] += 1
        elif name == "copy_":
            destination, source = args[:2]
            if isinstance(destination, PretendTensor) is not isinstance(source, PretendTensor):
                there = source if isinstance(destination, PretendTensor) else destination
                if not (_is_asynchronous(args, kwargs) and there.data_ptr() in self.pinned):
                    self.waits["copy_", _place()] += 1
        elif name == "_to_copy":
            source, leaves = args[0], self._leaving
            enters = not isinstance(source, PretendTensor) and not (
                kwargs.get("non_blocking") and source.data_ptr() in self.pinned
            )
            if leaves or enters:
                self.waits["copy to the CPU" if leaves else "copy to the device", _place()] += 1


class _Operations(TorchDispatchMode):
    """Gives operations that name the device to it."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.pretend = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        concerned = any(isinstance(leaf, PretendTensor) for leaf in leaves)
        if kwargs.get("device") is not None and (self.pretend.composing or _called_by_autograd()):
            kwargs = {**kwargs, "device": DEVICE}  # that of an operand, which is "cpu" for torch
        if concerned or (kwargs.get("device") is not None and on_device(kwargs["device"])):
            return self.pretend.compute(function, args, kwargs)
        return function(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Gives new tensors from values to the device, and looks at the arguments of attention."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.pretend = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None and on_device(kwargs["device"]):
            del kwargs["device"]
            self.pretend.waits["copy to the device", _place()] += 1
            return PretendTensor(torch.tensor(*args, **kwargs))
        if function is torch.empty and kwargs.get("pin_memory"):
            made = torch.empty(*args, **{**kwargs, "pin_memory": False})
            self.pretend.pinned.add(made.data_ptr())
            return made
        if function is functional.scaled_dot_product_attention and isinstance(args[0], PretendTensor):
            self.pretend.attention[_attention(*args, **kwargs)] += 1
            self.pretend.composing = True
            try:
                return function(*args, **kwargs)
            finally:
                self.pretend.composing = False
        return function(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> str:
    """`causal`, or why flash attention does not compute a call."""
    reasons = {
        "a mask": attn_mask is not None,
        f"dtype {query.dtype}": query.dtype not in (torch.bfloat16, torch.float16),
        "more than 256 channels": query.shape[-1] > 256,
        "channels of another size in values": query.shape[-1] != value.shape[-1],
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return ", ".join(found) if found else "causal" if is_causal else "not causal"


_KERNELS = (
    (signround_triton, signround_kernels.PlainKernels(), ("forward", "backward_update")),
    (lora_triton, lora_kernels.PlainKernels(), ("forward", "backward")),
    (search_triton, search_kernels.PlainKernels(), ("search_grid",)),
)
"""Modules with Triton kernels, the plain kernels that compute instead of them, and the names of the functions."""


def _checked_kernel(operation: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a module with Triton kernels: it checks its arguments as Triton does, and computes with plain kernels."""

    def run(*given: Any) -> Any:
        made = operation(*tree_map(_checked, given))
        if operation.__name__ == "backward_update":
            torch.autograd.graph.increment_version(given[2])
        return tree_map(lambda value: PretendTensor(value) if isinstance(value, torch.Tensor) else value, made)

    return run


def _checked(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, PretendTensor):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    if not value.is_contiguous():
        raise ValueError(f"a kernel was given a tensor of shape {tuple(value.shape)} that is not contiguous")
    return value.inner


class _Event:
    """An event of a stream, for which a thread waits."""

    recorded = False

    def record(self, *_: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        if not self.recorded:
            raise RuntimeError("an event is waited for that was not recorded")


_devices: list[PretendDevice] = []


def _active() -> PretendDevice:
    return _devices[-1]


def on_device(device: Any) -> bool:
    """Whether a value of the argument `device` of torch is the pretend device."""
    return torch.device(device).type == "cuda"


def _is_asynchronous(args: Any, kwargs: Any) -> bool:
    """Whether a call of `copy_` does not wait for the copy."""
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def _called_by_autograd() -> bool:
    """Whether an operation is one of a derivative of torch, and not of Python code in a backward pass."""
    frame = sys._getframe(1)
    while frame.f_code.co_name in ("__torch_dispatch__", "inner", "_fn"):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def _place() -> str:
    """File and line of the innermost frame that belongs to the package."""
    frame = sys._getframe(1)
    while frame is not None:
        _, package, name = frame.f_code.co_filename.rpartition("/cbqstream/")
        if package and "site-packages" not in frame.f_code.co_filename:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the package"


@contextmanager
def running(monkeypatch) -> Iterator[PretendDevice]:
    """Have torch report the pretend device inside a `with`.

    Args:
        monkeypatch: the fixture of pytest.
    """
    device = PretendDevice()
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "pretend",
        "max_memory_allocated": 1,
        **dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "synchronize", "reset_peak_memory_stats")),
    }

    def pin_memory(x: torch.Tensor, *_: Any) -> torch.Tensor:
        made = x.clone(memory_format=torch.contiguous_format)
        device.pinned.add(made.data_ptr())
        return made

    with monkeypatch.context() as patch, ExitStack() as modes:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        patch.setattr(torch.cuda, "Event", _Event)
        for module, plain, names in _KERNELS:
            for name in names:
                patch.setattr(module, name, _checked_kernel(getattr(plain, name)))
        modes.enter_context(_Functions(device))
        modes.enter_context(_Operations(device))
        _devices.append(device)
        try:
            yield device
        finally:
            _devices.pop()
