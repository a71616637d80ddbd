"""Cost of codes in closed form (`windows/closed_form.py`): memory, floating-point operations, and passes over the streams."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cbqstream.config import QuantizeConfig
from cbqstream.models.families import EXPERT, joined_with
from cbqstream.planning.sizes import ModelSizes

_FACTOR = 5
"""Floating-point operations of the factor of an inverse [I, I] and of its damping, for each of I^3; fitted to measured times."""
_CORRECTION, _ROUNDING = 8, 6
"""Floating-point operations of the correction and its share, and of rounding the columns, for each of O I^2. Rounding one column after the
other is slower than a matrix product; its number is fitted to measured times."""


@dataclass(frozen=True, slots=True)
class _Input:
    """Layers that read the same input."""

    rows: int
    """Number of output features of all of them."""
    columns: int
    """Number of input features."""
    expert: bool
    """Whether they belong to a routed expert."""


def _inputs(sizes: ModelSizes) -> Sequence[_Input]:
    """The inputs of the layers of a block.

    Layers that inference engines join read the same input. So do those of an expert, except for the last one, which writes its output.
    """
    found: dict[object, _Input] = {}
    last = {match[1]: name for name in sizes.layers if (match := EXPERT.search(name)) is not None}
    for name, (rows, columns) in sizes.layers.items():
        expert = EXPERT.search(name)
        key = joined_with(name.removesuffix(".weight")) if expert is None else (expert[1], last[expert[1]] == name)
        others = found[key].rows if key in found else 0
        found[key] = _Input(others + rows, columns, expert is not None)
    return list(found.values())


def closed_form_flop(config: QuantizeConfig, sizes: ModelSizes) -> float:
    """Floating-point operations for the codes of a block besides those of its passes.

    Each input has a Gram matrix of all tokens that it sees, and a cross matrix if it can differ between the streams.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
    """
    tokens, found = config.calibration.num_samples * config.calibration.seq_len, 0.0
    in_window = config.reconstruction.experts == "window"
    for each in _inputs(sizes):
        differs = not (each.expert and in_window) or config.scheme.activation_bits is not None
        seen = tokens * (sizes.experts if each.expert else 1)
        found += 2 * seen * each.columns**2 * (2 if differs else 1) + _FACTOR * each.columns**3
        found += ((_CORRECTION if differs else 0) + _ROUNDING) * each.rows * each.columns**2
    return found


def closed_form_passes(sizes: ModelSizes) -> int:
    """Number of times that a window reads a stream for the inputs of its stages. All experts are in two stages together.

    Args:
        sizes: sizes of what the windows hold.
    """
    inputs = _inputs(sizes)
    dense = sum(not each.expert for each in inputs)
    # experts get other tokens in the reference stream, which is not read for them
    return 2 * dense + (2 if dense < len(inputs) else 0)


def closed_form_bytes(config: QuantizeConfig, sizes: ModelSizes) -> dict[str, int]:
    """Memory while the codes of a layer are computed, in bytes by purpose.

    A layer has a Gram and a cross matrix for the training segments, and both for the held-out segments. All experts of a block have theirs
    at the same time; of the layers of an expert, those with the same number of columns share them.

    Args:
        config: settings of the run.
        sizes: sizes of what the windows hold, or of one expert.
    """
    of_experts = Counter[int]()
    for each in _inputs(sizes):
        if each.expert:
            of_experts[each.columns] += 4 * each.columns**2
    columns = max(columns for _, columns in sizes.layers.values())
    tokens = config.reconstruction.batch_size * config.calibration.seq_len
    return {
        # of both streams, as they are and in float32, and their difference
        "inputs of a layer": 6 * 4 * tokens * columns,
        "Gram matrices": 4 * max([4 * columns**2, *of_experts.values()]),
        "factors": 4 * 4 * columns**2,
        "weights in float32": 5 * 4 * sizes.largest,
    }
