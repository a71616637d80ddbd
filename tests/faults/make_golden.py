#!/usr/bin/env python3
"""Make the golden run directory of the current format, `golden/format-N`: a run of a tiny model with one of its three windows.

Usage: PYTHONPATH=tests:tests/faults make_golden.py

It is made once, when the format of the run directory changes, and stays as it is while later versions have this format.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from toy import HERE, Toy

from cbqstream.rundir.chain import Chain
from cbqstream.rundir.identity import FORMAT, canonical
from tiny import save_model

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Sizes of a model that is smaller than that of the toy."""


def without_paths(run: Path) -> None:
    """Replace the paths in the records of a run directory with one window by MODEL, OUT and TOKENS, and seal the records again."""
    chain = Chain.read(run)
    config = chain.run.config
    calibration = replace(config.calibration, dataset="TOKENS")
    record = replace(chain.run, config=replace(config, model="MODEL", out="OUT", calibration=calibration))
    commit = replace(chain.commits[0], prev=record.digest)
    (run / "run.json").write_bytes(canonical(record.to_dict()))
    (run / "commits" / "00000").write_bytes(canonical(commit.to_dict()))


def main() -> None:
    """Run one window, and copy the run directory without its lock file and tmp/."""
    golden = HERE / "golden" / f"format-{FORMAT}"
    if golden.exists():
        sys.exit(f"{golden}: exists. It must stay as it is.")
    with TemporaryDirectory() as folder:
        toy = Toy(Path(folder))
        model, out = save_model(Path(folder) / "small", **SIZES), toy.new_out()
        command = toy.quantize(out, "--num-samples", 2, "--group-size", 16, "--stop-after-window", 1, model=model)
        ended = toy.run(command)
        assert ended.code == 75, ended.err
        toy.close()
        run = Path(f"{out}.run")
        without_paths(run)
        shutil.copytree(run, golden, ignore=shutil.ignore_patterns("LOCK", "tmp"))
    for path in (golden, *golden.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # as git keeps them


if __name__ == "__main__":
    main()
