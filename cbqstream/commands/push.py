"""A finished model to the Hugging Face Hub, once it was checked."""

from pathlib import Path

from cbqstream.commands.check import check
from cbqstream.errors import InputError
from cbqstream.hub import push as upload
from cbqstream.hub import require_name


def push(out: Path, name: str, *, private: bool = True, blocks_path: str | None = None) -> str:
    """Check a result as `cbqstream check --read-data` does, and upload it; its address.

    Args:
        out: a result of `quantize`, or a model without quantization. What `check` does not read is refused: other formats, run directories.
        name: `owner/name` on the Hub; made where it does not exist.
        private: whether it is made so that only its owner sees it.
        blocks_path: module path of the list of transformer blocks; found by default.

    Raises:
        UsageError: the name is none.
        InputError: the check found something.
        StorageError: the Hub did not take it.
    """
    require_name(name)  # before all of it is read
    if (out / "run.json").exists():
        raise InputError(out, "a run directory, which is never pushed. Give the model that the run made.")
    problems = check(out, read_data=True, blocks_path=blocks_path).problems
    if problems:
        raise InputError(out, f"not pushed: {problems[0]}")
    return upload(out, name, private=private)
