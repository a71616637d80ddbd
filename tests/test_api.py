"""The public interface is the names of `cbqstream.__all__`. Importing the package does not import torch."""

import subprocess
import sys

import cbqstream


def test_all_public_names_can_be_imported():
    for name in cbqstream.__all__:
        assert getattr(cbqstream, name) is not None


def test_public_functions_are_still_functions_after_their_first_use():
    """A subpackage with the name of a public function would replace the function as soon as it is imported."""
    for _ in range(2):
        assert all(callable(getattr(cbqstream, name)) for name in ("quantize", "plan", "evaluate"))


def test_unknown_names_raise_an_attribute_error():
    assert not hasattr(cbqstream, "quantise")


def test_settings_command_line_journal_and_status_are_imported_without_torch():
    code = "import sys, cbqstream, cbqstream.cli.main, cbqstream.rundir.journal, cbqstream.report.status; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
