#!/usr/bin/env python3
"""Try well-known models as they are published, as tiny random models, from the source to the loaded result.

Usage: published.py RESULTS [--only NAME ...] [--models DIR] [--jobs N] [--timeout SECONDS]

For each model of `published_models.py`, the logits of the streamed evaluation are compared with those of transformers for the same weights,
the model is quantized to W4A16, a run that stopped after one window is resumed and compared byte for byte, and the result is checked and
loaded with transformers. RESULTS holds one JSON object per line and model, `tests/families/page.py` makes a table of it, which is printed.
The exit code is 1 if anything fails but a refusal before anything is written.
"""

import contextlib
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from architecture_models import NEAR, NotBuildableError, difference, one_line
from architectures import Trial, quantized_share, results_of, settings_for, streamed_difference
from published_models import PUBLISHED, make_published, transformers_logits

from cbqstream import quantize
from cbqstream.commands.check import check
from cbqstream.errors import StoppedError
from families.page import published_table
from tiny import files_of

STAGES = ("evaluate", "quantize", "resume", "load")
WRITTEN = ("out", "out.run", "out.tmp", "resumed", "resumed.run", "resumed.tmp")
OF_RUN = "metrics.jsonl"
"""File of a result with times."""


def try_published(name, folder):
    """Outcome of each stage for a model, as a JSON object: `yes`, `NO`, `refused`, or nothing if the stage did not run."""
    row = PUBLISHED[name]
    record = {"type": name, "storage": row.storage, **dict.fromkeys(STAGES, "")}
    try:
        make_published(name, folder)
    except NotBuildableError as error:
        return record | {"line": f"transformers cannot be compared: {error}"}
    clear(folder)
    # first, because `check` gives transformers further rules
    remarks = [read_by_transformers(row, folder)] if row.encode else []
    trial = Trial(folder)
    apart = trial.run("evaluate", streamed_difference)
    if apart is not None and not apart <= NEAR:
        trial.fail("wrong", "evaluate", f"logits differ by {apart:.1e} of the largest one")
    trial.run("quantize", lambda folder: quantize(settings_for(folder, "out")))
    stages = ["evaluate", "quantize"]
    if (folder / "out" / "config.json").exists():
        stages = STAGES
        resume(trial)
        share = trial.run("load", quantized_share)
        if share is not None and share < 0.995:
            remarks.append(f"{share:.1%} of the block weights are quantized")
        found = trial.run("load", lambda folder: check(folder / "out", read_data=True, load=True))
        for problem in found.problems if found else ():
            trial.fail("check failed", "load", problem)
    failed = {}
    for outcome, stage, line in trial.failures:
        failed.setdefault(stage, "refused" if outcome == "refused" else "NO")
        if line not in remarks:
            remarks.append(line)
    clear(folder)
    outcomes = {stage: failed.get(stage, "yes") for stage in stages}
    return record | outcomes | {"line": "; ".join(remarks), "difference": apart}


def resume(trial):
    """Stop a run after one window, resume it, and compare the result with that of the run that was not stopped."""

    def stop_and_resume(folder):
        with contextlib.suppress(StoppedError):
            quantize(settings_for(folder, "resumed"), stop_after_window=1)
            trial.fail("wrong", "resume", "the run did not stop")
        quantize(settings_for(folder, "resumed"))
        whole, resumed = (files_of(folder / out) for out in ("out", "resumed"))
        different = [name for name in whole | resumed if name != OF_RUN and whole.get(name) != resumed.get(name)]
        if different:
            trial.fail("wrong", "resume", f"the resumed run wrote another {different[0]}")

    trial.run("resume", stop_and_resume)


def read_by_transformers(row, folder):
    """How transformers itself reads the published form of a quantized model, in words."""
    try:
        logits = transformers_logits(row, folder / "source", folder, dtype=torch.bfloat16)
    except Exception as error:  # noqa: BLE001  # any error is an outcome
        line = one_line(error).replace(f"{folder}/", "")[:100]
        return f"transformers does not read the source ({type(error).__name__}: {line})"
    apart = difference(logits, torch.from_numpy(np.load(folder / "reference.npy")))
    return (
        "transformers reads the source too"
        if apart < NEAR
        else f"transformers reads the source with other logits, by {apart:.1g}"
    )


def clear(folder):
    """Delete what `quantize` writes."""
    for name in WRITTEN:
        shutil.rmtree(folder / name, ignore_errors=True)


def main():
    records = results_of(__doc__, list(PUBLISHED), try_published)
    print("\n".join(published_table([records[name] for name in PUBLISHED if name in records])))
    sys.exit(any("NO" in record.values() or record.get("outcome") == "traceback" for record in records.values()))


if __name__ == "__main__":
    main()
