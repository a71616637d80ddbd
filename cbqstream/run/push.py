"""A finished model to the Hugging Face Hub, once every byte of it was looked at."""

from pathlib import Path

from cbqstream.errors import InputError
from cbqstream.hub import push as upload
from cbqstream.run.check import check


def push(out: Path, name: str, *, private: bool = True) -> str:
    """Check a result and upload it; its address.

    Args:
        out: a result of `quantize`, or a model without quantization; other formats cannot be checked, and are refused.
        name: `owner/name` on the Hub; made where it does not exist.
        private: whether it is made so that only its owner sees it.

    Raises:
        InputError: the check found something.
        StorageError: the Hub did not take it.
    """
    problems = check(out, read_data=True).problems
    if problems:
        raise InputError(out, f"not pushed: {problems[0]}")
    return upload(out, name, private=private)
