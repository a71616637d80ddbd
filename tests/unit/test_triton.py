"""Triton kernels of signround, compared with the kernels in plain torch and with float64, and what all Triton kernels have in common.

They run on a GPU, or without one in the interpreter of Triton, which computes on the CPU.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import require_interpreter

from cbqstream.errors import UsageError
from cbqstream.numerics.affine import grouped, level_range
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.rounding import lora_kernels, search_kernels, signround_kernels
from cbqstream.rounding.kernels import KernelSet
from cbqstream.rounding.signround_kernels import PlainKernels
from cbqstream.scheme import Scheme

pytest.importorskip("triton")
require_interpreter()
HERE = Path(__file__).parent
MODULE = "cbqstream.rounding.signround_triton"
kernels = importlib.import_module(MODULE)
SETS = {"signround": signround_kernels.KERNELS, "lora_rounding": lora_kernels.KERNELS, "search": search_kernels.KERNELS}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = [
    (Scheme(num_bits=bits, group_size=size, symmetric=symmetric), shape)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for size, shape in ((64, (20, 256)), (32, (33, 96)), (None, (16, 200)), (8, (7, 64)))
]


def operands(scheme, shape, dtype):
    generator = torch.Generator().manual_seed(scheme.num_bits)
    w, v, gradient = (torch.randn(shape, generator=generator) for _ in range(3))
    gradient[0, :5] = 0
    w, v, gradient = w.to(dtype), (v * 0.3).clamp(-0.5, 0.5).half(), gradient.to(dtype)
    scale, zero_point = minmax_grid(w * 0.9, scheme)  # some weights are outside the grid
    theta = torch.randn(scale.shape, generator=generator) * 0.05
    bounds = tuple(
        value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in level_range(scheme, zero_point)
    )
    return w.to(DEVICE), (scale * theta.exp()).to(DEVICE), v.to(DEVICE), bounds, gradient.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=str)
def test_triton_kernels_equal_the_plain_kernels(scheme, shape, dtype):
    """w_hat and v are equal bit for bit. The gradient of theta has the precision of a float32 sum."""
    w, scale, v, bounds, gradient = operands(scheme, shape, dtype)
    expected, actual, v_of_triton = torch.empty_like(w.float()), torch.full_like(w.float(), torch.nan), v.clone()
    PlainKernels().forward(w, scale, v, *bounds, expected)
    kernels.forward(w, scale, v, *bounds, actual)
    assert torch.equal(actual, expected)

    before = v.clone()
    plain_gradient = PlainKernels().backward_update(w, scale, v, *bounds, gradient, 0.01)
    triton_gradient = kernels.backward_update(w, scale, v_of_triton, *bounds, gradient, 0.01)
    assert torch.equal(v_of_triton, v)
    assert not torch.equal(v_of_triton, before)

    exact = theta_gradient(w, scale, before, bounds, gradient)
    size = theta_gradient(w, scale, before, bounds, gradient, absolute=True)
    for found in (plain_gradient, triton_gradient):
        assert ((found.double() - exact).abs() <= 1e-5 * size).all()


def theta_gradient(w, scale, v, bounds, gradient, *, absolute=False):
    """Gradient of theta by its formula, in float64; with `absolute`, the sum of the absolute values of its terms."""
    groups = scale.shape[1]
    scale = scale.unsqueeze(-1)
    w_over_s = grouped(w.float(), groups) / scale
    levels = (w_over_s + grouped(v.float(), groups)).round()
    low, high = bounds
    inside = (levels >= low) & (levels <= high)
    terms = levels.clamp(low, high).double() - w_over_s.double() * inside
    terms = terms * grouped(gradient.double(), groups) * scale.double()
    return (terms.abs() if absolute else terms).sum(-1)


@pytest.mark.parametrize("method", SETS)
def test_kernels_that_do_not_run_are_refused(method, monkeypatch):
    """The error is that of a machine without a C compiler."""
    monkeypatch.setattr(KernelSet, "chosen", lambda self, *_: importlib.import_module(self.triton))
    SETS[method].require("auto", torch.device(DEVICE))

    def fail(*_):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    last = {"signround": "backward_update", "lora_rounding": "backward", "search": "search_grid"}
    monkeypatch.setattr(importlib.import_module(SETS[method].triton), last[method], fail)
    with pytest.raises(UsageError, match=r"do not run \(Failed to find C compiler\.\)\. .* use --kernels plain\."):
        SETS[method].require("auto", torch.device(DEVICE))


@pytest.mark.parametrize("method", SETS)
def test_kernels_are_those_of_triton_on_cuda_and_plain_ones_otherwise(method, monkeypatch):
    cuda, of_method = torch.device("cuda"), SETS[method]
    assert of_method.chosen("auto", torch.device("cpu")) is of_method.plain
    assert of_method.chosen("plain", cuda) is of_method.plain
    assert of_method.chosen("auto", cuda).__name__ == of_method.triton
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, of_method.triton, raising=False)
    with pytest.raises(UsageError, match=r"triton cannot be loaded .*\. Install it, or use --kernels plain\."):
        of_method.chosen("auto", cuda)


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
def test_kernels_compile_for_gpus_without_spills_and_with_wide_loads(sm, tmp_path):
    """Every variant that is launched is compiled ahead of time: no GPU is needed.

    No thread keeps values outside its registers, no memory is changed by several programs, and weights are read and written 16 bytes at a
    time where their rows begin at a multiple of 16 bytes. Kernels of signround multiply and add in two instructions, as plain ones do.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, HERE / "compile_kernels.py", str(sm), *(["--all"] if sm == 90 else [])]
    made = subprocess.run(
        script,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert len(found) == (42 + 28 + 3 + 12 if sm == 90 else 8 + 4 + 4)
    for variant, kernels_of_it in found.items():
        searches = variant.startswith("search")
        assert len(kernels_of_it) == (1 if searches else 2), variant
        for facts in kernels_of_it:
            assert (facts["stack"], facts["local"], facts["atomic"]) == (0, 0, 0), variant
            assert searches or (facts["fused"] > 0) == variant.startswith("lora_rounding"), variant
            assert 0 < facts["reg"] <= 255, variant
            aligned = "unaligned" not in variant
            assert (facts["wide loads"] > 0) == aligned, variant
            if not searches:  # a search writes only scales, and reads the second moments of a group that may be short
                assert not (aligned and facts["narrow"]), variant
                assert (facts["wide stores"] > 0) == aligned or facts["partial sums"], variant
