"""Peak resident memory does not depend on the number of blocks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "runtime/memory.py"


@pytest.mark.memory
def test_peak_memory_is_flat_in_the_number_of_blocks(tmp_path):
    """4 and 20 blocks of 7 MB each; holding on to them would cost a quarter of what the process uses.

    The bound leaves room for holes in the heap, a few per cent that come and go between runs.
    """
    command = [sys.executable, str(BENCHMARK), str(tmp_path / "work"), "--rows", "512,4,4", "512,20,4"]
    subprocess.run([*command, "--results", str(tmp_path / "memory.json")], check=True, capture_output=True)
    few, many = json.loads((tmp_path / "memory.json").read_text())
    assert many["checkpoint"] > 4.5 * few["checkpoint"]
    assert many["peak_rss"] < 1.12 * few["peak_rss"]
