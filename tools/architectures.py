#!/usr/bin/env python3
"""Try every architecture for text generation of the installed transformers on a tiny random model, each in a process of its own.

Usage: architectures.py RESULTS [--only TYPE ...] [--models DIR] [--jobs N] [--timeout SECONDS]

The logits of the streamed evaluation are compared with those of transformers, the model is quantized, and the result is checked and loaded
with transformers. RESULTS holds one JSON object per line and type. Types that are in it already are left out, unless they are named with
--only; `tests/families/page.py` makes a table of it. The exit code is 1 if transformers can run a type that is neither right nor refused
before anything is written.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from architecture_models import NEAR, NotBuildableError, all_types, difference, make_model, one_line, segments

import cbqstream
from cbqstream import PROFILES, CalibrationConfig, CbqstreamError, QuantizeConfig, Scheme, quantize
from cbqstream.commands.check import check
from cbqstream.evaluation.model import EvaluatedModel, open_model

FAILURES = ("traceback", "wrong", "refused late", "check failed", "refused")
"""Outcomes of a stage that fails, the worst first. The outcome of a type is its worst failure, `right` or `not buildable`."""
FINE = ("right", "refused", "not buildable")
PACKAGE = Path(cbqstream.__file__).parent


def streamed_difference(folder):
    """Difference of the streamed logits from those of transformers."""
    ids_NS = segments(folder)
    model = EvaluatedModel.open(folder / "source", device="cpu", threads=1)
    with torch.no_grad(), model.hidden_states([ids_NS]) as (stream,), model.head() as outer:
        found = torch.stack([torch.cat(list(outer.logits(stream.read(row)))) for row in range(len(ids_NS))])
    return difference(found, torch.from_numpy(np.load(folder / "reference.npy")))


def quantize_model(folder):
    """Quantize `source` to `out`."""
    quantize(settings_for(folder, "out"))


def settings_for(folder, out):
    """Settings of a quick run for `source`: W4A16 by rounding to nearest."""
    profile = PROFILES["fast"]
    return QuantizeConfig(
        model=str(folder / "source"),
        out=str(folder / out),
        scheme=Scheme(num_bits=4, group_size=32),
        calibration=CalibrationConfig(dataset=str(folder / "ids.npy"), num_samples=8, seq_len=16),
        window=profile.window,
        transforms=profile.transforms,
        reconstruction=replace(profile.reconstruction, rounding="nearest"),
        device="cpu",
        threads=1,
    )


def quantized_share(folder):
    """Share of the elements of the matrices of all blocks that is quantized in `out`."""
    meta_model, _ = open_model(folder / "out")
    blocks = list(zip(meta_model.blocks, meta_model.templates, strict=True))
    quantized = sum(block.get_submodule(name).weight.numel() for spec, block in blocks for name in spec.linears)
    return round(quantized / sum(p.numel() for _, block in blocks for p in block.parameters() if p.dim() > 1), 3)


class Trial:
    """The stages of one model, and what went wrong in them.

    Args:
        folder: folder that `make_model` has written.
    """

    def __init__(self, folder):
        self.folder = folder
        self.failures = []

    def fail(self, outcome, stage, line):
        """Record a failure."""
        self.failures.append((outcome, stage, line.replace(f"{self.folder}/", "")))

    def run(self, stage, step):
        """Result of a step, or None if it raises an error, which is recorded."""
        try:
            return step(self.folder)
        except CbqstreamError as error:
            late = stage == "quantize" and any((self.folder / name).exists() for name in ("out", "out.run"))
            self.fail("refused late" if late else "refused", stage, str(error))
        except Exception as error:  # noqa: BLE001  # any error is an outcome
            traceback.print_exc()
            frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PACKAGE)]
            where = (
                f"{Path(frames[-1].filename).relative_to(PACKAGE.parent)} {frames[-1].name}" if frames else "outside"
            )
            self.fail("traceback", stage, f"{type(error).__name__} in {where}: {one_line(error)}")
        return None

    def stages(self):
        """Run all stages, and return their measurements."""
        self.clear()
        apart = self.run("evaluate", streamed_difference)
        if apart is not None and not apart <= NEAR:
            self.fail("wrong", "evaluate", f"logits differ by {apart:.1e} of the largest one")
        share = None
        self.run("quantize", quantize_model)
        if (self.folder / "out" / "config.json").exists():
            share = self.run("check", quantized_share)
            found = self.run("check", lambda folder: check(folder / "out", read_data=True, load=True))
            for problem in found.problems if found else ():
                self.fail("check failed", "check", problem)
        self.clear()
        return {"difference": apart, "quantized": share}

    def clear(self):
        """Delete what `quantize` writes."""
        for name in ("out", "out.run", "out.tmp"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def try_type(name, folder):
    """Outcome of one type, as a JSON object."""
    try:
        make_model(name, folder)
    except NotBuildableError as error:
        return {"type": name, "outcome": "not buildable", "line": str(error), "failures": []}
    trial = Trial(folder)
    measured = trial.stages()
    outcome, _, line = min(trial.failures, key=lambda failure: FAILURES.index(failure[0]), default=("right", "", ""))
    return {"type": name, "outcome": outcome, "line": line, "failures": trial.failures, **measured}


def child(attempt, name, folder, pipe):
    """Try one model in a forked process, with its output in a file beside the folder of its model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(folder.with_name(f"{name}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    pipe.send(attempt(name, folder))


def sweep(names, models, jobs, timeout, attempt=try_type):
    """Yield the JSON object of each model. A process is forked for each, because importing torch and transformers takes seconds.

    Args:
        names: names of the models.
        models: folder with a folder for each model.
        jobs: number of processes at a time.
        timeout: seconds for one model.
        attempt: function of the name and the folder of a model, which returns the JSON object.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(attempt, name, models / name, sender))
            process.start()
            sender.close()
            running[name] = (process, receiver, time.monotonic())
        wait([receiver for _, receiver, _ in running.values()], timeout=1)
        for name, (process, receiver, began) in list(running.items()):
            seconds = round(time.monotonic() - began, 1)
            if not receiver.poll() and seconds < timeout:
                continue
            line = f"no result after {timeout} s"
            record = {"type": name, "outcome": "traceback", "failures": []}
            if receiver.poll():
                try:
                    record = receiver.recv()
                    line = record["line"]
                except EOFError:
                    process.join()
                    line = f"the process ended with code {process.exitcode}"
            process.kill()
            process.join()
            del running[name]
            yield record | {"line": line, "seconds": seconds}


def results_of(description, known, try_one, tell=lambda record: None):
    """Try the models that the command line selects, and return all results by name; new ones are added to RESULTS.

    Args:
        description: what the program does.
        known: names of all models.
        try_one: function that tries one, see `sweep`.
        tell: called with each new result.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("results", type=Path, help="file of JSON lines; results are added")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=known, help="models to try, also if they are in RESULTS"
    )
    parser.add_argument("--models", type=Path, help="folder in which the tiny models are kept and reused")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    records = {record["type"]: record for record in map(json.loads, lines)}
    names = options.only or [name for name in known if name not in records]
    with tempfile.TemporaryDirectory() as folder, options.results.open("a") as file:
        for record in sweep(names, options.models or Path(folder), options.jobs, options.timeout, try_one):
            records[record["type"]] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            tell(record)
    return records


def tell(record):
    """Print the result of one type."""
    print(f"{record['type']}: {record['outcome']} {record['line']} ({record['seconds']} s)", flush=True)


def main():
    records = results_of(__doc__, all_types(), try_type, tell)
    counts = Counter(record["outcome"] for record in records.values())
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    sys.exit(any(outcome not in FINE for outcome in counts))


if __name__ == "__main__":
    main()
