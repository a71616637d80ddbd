"""The public interface is exactly `__all__`, and starts without torch."""

import subprocess
import sys

import cbqstream


def test_all_is_importable():
    for name in cbqstream.__all__:
        assert getattr(cbqstream, name) is not None


def test_functions_stay_functions():
    """No package may have the name of one: once it is imported it would be what the name gives."""
    for _ in range(2):
        assert all(callable(getattr(cbqstream, name)) for name in ("quantize", "plan", "evaluate"))


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(cbqstream, "quantise")


def test_settings_and_command_line_start_without_torch():
    code = "import sys, cbqstream, cbqstream.cli.main, cbqstream.rundir.journal, cbqstream.report.status; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
