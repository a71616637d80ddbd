"""Whether the interpreter of Triton runs with the installed numpy. Tests of kernels need it on a machine without a GPU."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _sum_kernel(out_ptr, number):
    total = 0
    for each in range(number):
        total += each
    tl.store(out_ptr, total)


def require_interpreter():
    """Skip the tests of a module if a loop does not run in the interpreter: that of Triton 3.6 fails with numpy 2.4 and later."""
    if torch.cuda.is_available():
        return
    out = torch.zeros(1, dtype=torch.int64)
    try:
        _sum_kernel[(1,)](out, 4)
    except Exception as error:  # noqa: BLE001  # of another type in each version
        about = f"the interpreter of Triton {triton.__version__} does not run with numpy {np.__version__} ({error})"
        pytest.skip(about, allow_module_level=True)
    assert out.item() == 6
