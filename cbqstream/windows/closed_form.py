"""Quantization of a block layer by layer, in the order in which the layers are called, with codes in closed form.

For each stage of the block (`stage_inputs.py`), both streams run up to the inputs of the stage; in the quantized stream, the layers of
earlier stages compute with their final codes. From these inputs, each layer of the stage gets its codes (`numerics/gptq.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbqstream.config import ReconstructionConfig
from cbqstream.errors import InputError
from cbqstream.numerics.gptq import InverseFactor, NotPositiveDefiniteError, correction, correction_share, gptq_levels
from cbqstream.records import RunWarning
from cbqstream.rounding.gptq import Gptq
from cbqstream.windows.expert_stages import PRIOR_TOKENS, ExpertStages
from cbqstream.windows.quantized_linear import QuantizedLinear
from cbqstream.windows.resident_block import ResidentBlock
from cbqstream.windows.schedule import split_held_out
from cbqstream.windows.stage_inputs import SharedInput, StageInputs


@dataclass(slots=True)
class _Moments:
    """Sums over the tokens of an input."""

    gram: Tensor
    """H, float32 [I, I]."""
    cross: Tensor | None
    """C, float32 [I, I]; None if it is zero."""
    tokens: int = 0

    @classmethod
    def none(cls, layer: QuantizedLinear, *, cross: bool) -> "_Moments":
        """Sums over no token.

        Args:
            layer: a layer that reads the input.
            cross: whether the inputs of both streams may differ.
        """
        stored = layer.offloaded("weight")
        gram = torch.zeros(
            *[layer.weight.shape[1]] * 2, device=layer.weight.device if stored is None else stored.device
        )
        return cls(gram, torch.zeros_like(gram) if cross else None)

    def add(self, x_TI: Tensor, reference_TI: Tensor) -> None:
        """Add tokens.

        Args:
            x_TI: inputs in the quantized stream, as the layer multiplies them, float32.
            reference_TI: inputs of the same tokens in the reference stream, float32.
        """
        self.gram.addmm_(x_TI.T, x_TI)
        self.tokens += len(x_TI)
        if self.cross is not None:
            self.cross.addmm_((reference_TI - x_TI).T, x_TI)


@torch.no_grad()
def round_in_closed_form(
    inputs: StageInputs | ExpertStages, config: ReconstructionConfig, warn: Callable[[RunWarning], None]
) -> None:
    """Give every layer of a block its codes.

    Args:
        inputs: the block or expert, whose layers have the rounding `Gptq`, and both streams at its input.
        config: settings.
        warn: called with warnings.

    Raises:
        InputError: a layer is never called, or its inputs are not finite.
    """
    training, held_out = split_held_out(inputs.quantized.shape.num_segments)
    for stage in inputs.stages():
        sums = _moments(inputs, stage, training)
        differing = [shared for shared in stage if sums[shared.first].cross is not None]
        sums_of_held_out = _moments(inputs, differing, held_out) if differing else {}
        if stage[0].is_of_expert:
            _add_prior(list(sums.values()))
        for shared in stage:
            try:
                damping = _round(
                    inputs.block, shared, sums.pop(shared.first), sums_of_held_out.pop(shared.first, None), config
                )
            except NotPositiveDefiniteError as error:
                message = f"the Gram matrix of the inputs of {shared.first} cannot be used: {error}. Use --ignore {shared.first}."
                raise InputError(inputs.block.label, message) from error
            if damping > config.damping:
                warn(
                    RunWarning(
                        f"{inputs.block.label}: {', '.join(shared.layers)}: the damping was raised to {damping:g}, because the"
                        " Gram matrix of the inputs is not positive definite. A larger --num-samples may help."
                    )
                )


def _moments(
    inputs: StageInputs | ExpertStages, stage: Sequence[SharedInput], segments: Sequence[int]
) -> dict[str, _Moments]:
    """Sums over the tokens of segments, by the name of the first layer that reads an input."""
    layers = {shared.first: inputs.block.layers[shared.first] for shared in stage}
    found = {}
    for shared in stage:
        quantizes = layers[shared.first].scheme.activation_bits is not None
        found[shared.first] = _Moments.none(layers[shared.first], cross=quantizes or not shared.is_of_expert)
    for references, seen in inputs.read(stage, segments):
        for name, x_TI in seen.items():
            # an expert gets other tokens in the reference stream; its own inputs before they are quantized take their place
            reference_TI = references.get(name, x_TI).float()
            found[name].add(layers[name].quantized_input(x_TI).float(), reference_TI)
    return found


def _add_prior(experts: Sequence[_Moments]) -> None:
    """Add the mean Gram matrix of all experts to that of each expert, because an expert may see few tokens."""
    tokens = sum(each.tokens for each in experts)
    mean_II = sum((each.gram for each in experts[1:]), start=experts[0].gram) * (PRIOR_TOKENS / max(tokens, 1))
    for each in experts:
        each.gram += mean_II


def _round(
    block: ResidentBlock,
    shared: SharedInput,
    sums: _Moments,
    of_held_out: _Moments | None,
    config: ReconstructionConfig,
) -> float:
    """Give layers that read the same input their codes.

    Args:
        block: the block of the layers.
        shared: the layers.
        sums: sums over the training tokens.
        of_held_out: sums over the held-out tokens; None if the inputs do not differ between the streams.
        config: settings.

    Returns:
        The damping that was needed.

    Raises:
        NotPositiveDefiniteError: the Gram matrix has no factor.
    """
    factor = InverseFactor.of(sums.gram, config.damping)
    for name in shared.layers:
        rounding = block.layers[name].rounding
        if not isinstance(rounding, Gptq):
            raise TypeError(f"{name} has the rounding {type(rounding).__name__}, not Gptq")
        with rounding.placed():
            w_OI = rounding.weight.float()
            if sums.cross is not None and of_held_out is not None and of_held_out.cross is not None:
                change_OI = correction(w_OI, sums.cross, factor)
                share = correction_share(w_OI, change_OI, of_held_out.gram, of_held_out.cross)
                w_OI = w_OI + share * change_OI
            levels = gptq_levels(w_OI, factor, rounding.scale0, rounding.zero_point, rounding.scheme)
        rounding.assign(rounding.scale0, rounding.zero_point, levels)
    return factor.damping
