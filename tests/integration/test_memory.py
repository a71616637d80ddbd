"""Peak resident memory of a run does not depend on the number of blocks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "memory.py"


@pytest.mark.memory
def test_quantizing_20_blocks_takes_no_more_memory_than_quantizing_4(tmp_path):
    """A block has 7 MB. If a run kept all blocks, 16 more of them would add a quarter to the memory of the process.

    The bound of 12 % allows for a fragmented heap, which differs by a few percent between runs.
    """
    command = [sys.executable, str(BENCHMARK), str(tmp_path / "work"), "--rows", "512,4,4", "512,20,4"]
    subprocess.run([*command, "--results", str(tmp_path / "memory.json")], check=True, capture_output=True)
    few, many = json.loads((tmp_path / "memory.json").read_text())
    assert many["checkpoint"] > 4.5 * few["checkpoint"]
    assert many["peak_rss"] < 1.12 * few["peak_rss"]
