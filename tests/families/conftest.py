"""The programs in tools/ that make and try tiny models."""

import importlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool_named(monkeypatch):
    """Function that imports a program of tools/ by its name."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


@pytest.fixture
def tool(tool_named):
    """The module of `tools/architectures.py`."""
    return tool_named("architectures")
