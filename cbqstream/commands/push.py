"""Upload of a finished model to the Hugging Face Hub, after a check."""

from pathlib import Path

from cbqstream.commands.check import check
from cbqstream.errors import InputError
from cbqstream.hub import push as upload
from cbqstream.hub import require_name
from cbqstream.rundir.chain import is_run


def push(
    out: Path, name: str, *, private: bool = True, blocks_path: str | None = None, allow_links: bool = False
) -> str:
    """Check a result as `cbqstream check --read-data` does, and upload it.

    Args:
        out: folder of a result of `quantize`, or of a model that is not quantized. Other formats and run directories are refused.
        name: `owner/name` on the Hub; the repository is created if it does not exist.
        private: whether a new repository is private.
        blocks_path: module path of the list of transformer blocks; found by default.
        allow_links: upload the files outside the folder to which its shards are links.

    Returns:
        Address of the repository.

    Raises:
        UsageError: `name` is not a valid name of a repository.
        InputError: the check found a problem.
        StorageError: the upload failed.
    """
    require_name(name)  # first, because the check reads the whole model
    if is_run(out):
        raise InputError(out, "a run directory, which cannot be uploaded. Give the folder of the finished model.")
    problems = check(out, read_data=True, blocks_path=blocks_path, allow_links=allow_links).problems
    if problems:
        raise InputError(out, f"not pushed: {problems[0]}")
    return upload(out, name, private=private)
