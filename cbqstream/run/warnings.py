"""Warnings about a model and its run, and the check that training does not fail in many windows."""

import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cbqstream.errors import InputError, some_shown
from cbqstream.models.experts import tokens_by_expert
from cbqstream.packed.output import other_files
from cbqstream.planning.engines import engine_warnings
from cbqstream.planning.requirements import source_warnings
from cbqstream.records import RunWarning
from cbqstream.rounding.registry import method_of
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.chain import Chain
from cbqstream.windows.reconstruct import NOT_FINITE
from cbqstream.windows.resident_block import ResidentBlock
from cbqstream.windows.schedule import split_held_out

_MOST_REVERTED = 0.1
"""Largest accepted share of windows whose loss was not finite."""
_NAMED = 8
"""Number of experts, or of files, that are named in a warning."""


def require_finite_windows(chain: Chain) -> None:
    """Check that training did not fail in many windows. Otherwise most of the result would be rounded to nearest.

    Raises:
        InputError: the loss was NaN or infinite in more than one window and in more than a tenth of all windows.
    """
    failed = [report.index for report in chain.window_reports if report.reverted == NOT_FINITE]
    if len(failed) > max(1, _MOST_REVERTED * chain.num_windows):
        raise InputError(
            chain.path,
            f"in {len(failed)} windows the loss was not finite, first in window {failed[0] + 1}."
            " Use a smaller --max-shift or --scale-lr in a new run.",
        )


def model_warnings(inputs: RunInputs) -> Iterator[RunWarning]:
    """Warnings about the model and the settings of a run."""
    kind, path = inputs.meta_model.config.model_type, inputs.meta_model.blocks_path
    if not inputs.meta_model.is_tested:
        yield RunWarning(
            f'{inputs.config.model}: architecture "{kind}" is untested here; its blocks were found at "{path}".'
        )
    if _stores_another_head(inputs):
        yield RunWarning(
            f"{inputs.config.model}: config.json ties the head to the embedding, but {inputs.meta_model.head[1]} is stored and differs"
            " from it. The stored head is used, as in transformers; other programs may tie it."
        )
    yield from map(RunWarning, source_warnings(inputs.config.model, inputs.meta_model))
    yield from (RunWarning(text) for text in engine_warnings(inputs.config, inputs.meta_model))
    yield from map(RunWarning, inputs.advice)
    settings, (training, held_out) = inputs.config.reconstruction, split_held_out(len(inputs.tokens))
    method = method_of(settings)
    if training == held_out and method.learns:
        yield RunWarning(
            f"{len(held_out)} segments are too few to hold some out: losses are those of training segments. Use --num-samples 8 or more."
        )
    steps = settings.epochs * math.ceil(len(training) / settings.batch_size)
    text = method.warning(settings, steps)
    if text is not None:
        yield RunWarning(text)
    left_out = other_files(Path(inputs.config.model)).left_out
    if left_out:
        yield RunWarning(
            f"{inputs.config.model}: not part of the model, and not copied: {some_shown(left_out, _NAMED)}."
            " Copy what you need of it into the result."
        )
    if inputs.model.get("auto_map"):
        yield RunWarning(f"{inputs.config.model}: the model contains code (auto_map), which is not run.")


def _stores_another_head(inputs: RunInputs) -> bool:
    """Whether config.json ties the head to the embedding, and the source has a head that differs from the embedding."""
    embedding, head = inputs.meta_model.embedding, inputs.meta_model.head[1]
    if not inputs.meta_model.is_head_tied or embedding == head:
        return False
    pieces = (inputs.source.raw(inputs.source.infos[name]) for name in (embedding, head))
    return any(one != other for one, other in zip_longest(*pieces))


def undersampled_experts(prefix: str, block: ResidentBlock, *, closed_form: bool) -> RunWarning:
    """Warning that names the undersampled experts of a block.

    Args:
        prefix: module path of the block.
        block: the block, with at least one undersampled expert.
        closed_form: whether the codes are computed in closed form.
    """
    counts = [count for path in tokens_by_expert(block.tokens).values() for count in path]
    names = sorted({name.rpartition(".")[0] for name in block.undersampled})
    return RunWarning(
        f"{prefix}: its {len(counts)} experts saw {min(counts):,} to {max(counts):,} tokens;"
        f" {'rounded with the inputs of all experts' if closed_form else 'rounded to nearest'}:"
        f" {some_shown(names, _NAMED)}. A larger --num-samples gives them more tokens."
    )


def vanished_rows(prefix: str, block: ResidentBlock) -> Iterator[RunWarning]:
    """A warning for each layer of a finished block with rows that became zero because they are below the smallest scale.

    Args:
        prefix: module path of the block.
        block: the block, which is hardened.
    """
    for name, rows in block.vanished.items():
        layer: Any = block.module.get_submodule(name)
        count = f"{rows:,} of {layer.weight.shape[0]:,} rows"
        yield RunWarning(
            f"{prefix}.{name}: {count} are below the smallest scale (2^-17) and became zero."
            f" To keep them, use --ignore {name} in a new run."
        )
