"""Reconstruction of one routed expert alone, on the tokens that the router sends to it.

The experts of a block are reconstructed in order. The target of expert e for a token with input x on the quantized stream is

    T = g E(x) + r,    and afterwards    r <- T - g Q(x)

where g is the weight of the router, E the original expert and Q the finished one. The residual r of a token is what the output of the
block lacks to its target with the original experts, after its other layers are final (`residuals.py`), and then with those experts of the
token replaced that are finished. So the squared error of T is that of the block with one more expert replaced: each expert corrects what
the other layers and the experts before it lost. The rounding is trained like that of a window, with the same batches of segments.

Shapes: N segments, S tokens in a segment, T tokens of the expert, D hidden dimension.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from cbqstream.activations.store import ActivationStore
from cbqstream.activations.token_store import TokenStore
from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.config import ReconstructionConfig
from cbqstream.models.block import BlockArguments
from cbqstream.numerics.losses import SMALLEST_POWER, channel_weights, expert_loss, token_weights
from cbqstream.records import Compute, QuantizedWeight, RunWarning
from cbqstream.rounding.registry import method_of
from cbqstream.runtime.memory import trim_heap
from cbqstream.scheme import Scheme
from cbqstream.windows.closed_form import round_in_closed_form
from cbqstream.windows.expert_stages import ExpertStages
from cbqstream.windows.quantized_linear import Phase, replace_linears
from cbqstream.windows.reconstruct import Reconstruction, TrainingData, reconstruct
from cbqstream.windows.resident_block import FEWEST_TOKENS, SAMPLED_TOKENS, BlockSettings, ResidentBlock, run_blocks
from cbqstream.windows.routed_experts import Routed, RoutedExperts, in_parts
from cbqstream.windows.schedule import split_held_out

SKEW = 2
"""Ratio of the tokens of an expert to those of a mean one up to which they are on the device together."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of tokens and channels in the loss of the experts of a block, from the targets of the block."""

    tokens: Tensor
    """Token weights before normalization, float32 [N S]."""
    power: Tensor
    """Power of the tokens, float32 [N S]."""
    channels: Tensor
    """Channel weights, float32 [D]."""

    @classmethod
    def of(cls, targets: ActivationStore, config: ReconstructionConfig, hidden_size: int) -> "LossWeights":
        """Weights for targets of a block.

        Args:
            targets: targets for the output of the block.
            config: settings.
            hidden_size: width of the outputs of the experts. If the block hands on another width, all channels have the same weight.
        """
        tokens, powers, share_D = [], [], torch.zeros(targets.shape.hidden_size, dtype=torch.float64)
        for segment in range(targets.shape.num_segments):
            target_SD = targets.read(segment).float()
            power_S = target_SD.square().sum(-1).clamp(min=SMALLEST_POWER)
            kept_S = token_weights(target_SD.unsqueeze(0), config.robust_tokens)[0]
            weights_S = kept_S * power_S.pow(-config.token_balance)
            share_D += (target_SD.square() * weights_S.unsqueeze(1)).sum(0, dtype=torch.float64)
            tokens.append(weights_S)
            powers.append(power_S)
        channels = torch.ones(hidden_size)
        if config.channel_balance and hidden_size == len(share_D):
            channels = channel_weights((share_D / share_D.sum()).float(), config.channel_balance)
        return cls(torch.cat(tokens), torch.cat(powers), channels)


class _Tokens(NamedTuple):
    """Tokens of an expert on the device."""

    x: Tensor
    """Inputs [T, D]."""
    target: Tensor
    """Targets of the weighted outputs [T, D], float32."""
    gate: Tensor
    """Weights of the router [T, 1], float32."""
    weight: Tensor
    """Token weights of the loss [T]."""
    power: Tensor
    """Power of the tokens at the output of the block [T]."""


@dataclass(frozen=True, slots=True)
class ExpertData(TrainingData[_Tokens]):
    """Inputs and targets of an expert, in the order of its tokens."""

    tokens: _Tokens
    """All tokens, on the device or, if they are very many, on the CPU."""
    firsts: Sequence[int]
    """Position of the first token of each segment, and the number of all tokens."""
    channels: Tensor
    """Channel weights of the loss [D]."""
    compute: Compute
    config: ReconstructionConfig

    @property
    @override
    def num_segments(self) -> int:
        return len(self.firsts) - 1

    @override
    def covers(self, segments: Sequence[int]) -> bool:
        return any(self.firsts[segment] < self.firsts[segment + 1] for segment in segments)

    @override
    def read(self, blocks: Sequence[ResidentBlock], batches: Sequence[Sequence[int]]) -> Iterator[_Tokens]:
        for batch in batches:
            parts = [slice(self.firsts[segment], self.firsts[segment + 1]) for segment in batch]
            chosen = (torch.cat([value[part] for part in parts]).to(self.compute.device) for value in self.tokens)
            x_TD, *others = chosen
            yield _Tokens(x_TD.to(self.compute.dtype), *others)

    @override
    def size(self, batch: _Tokens) -> int:
        return len(batch.x)

    @override
    def loss(self, blocks: Sequence[ResidentBlock], batch: _Tokens, phase: Phase, step: int) -> Tensor:
        h_TD = run_blocks(blocks, batch.x, phase).float() * batch.gate
        return expert_loss(h_TD, batch.target, batch.weight, batch.power, self.channels)


@dataclass(frozen=True, slots=True)
class ExpertResult:
    """A finished expert."""

    weights: Mapping[str, QuantizedWeight]
    """Quantized weights by the name of the layer in the expert."""
    tokens: int
    """Number of its tokens."""
    undersampled: bool
    """Whether it has too few training tokens to learn from."""
    reconstruction: Reconstruction
    sqnr_db: Mapping[str, float]
    """Signal to quantization noise of the weights in decibels, by layer."""
    vanished: Mapping[str, int]
    """Number of rows that became zero, by layer; without layers that have none."""


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """Everything from which the experts of a block are reconstructed."""

    experts: RoutedExperts
    source: WeightSource
    schemes: Mapping[str, Scheme]
    """Schemes of the quantized layers of the block, by name."""
    routed: Routed
    """Inputs on the quantized stream."""
    reference: TokenStore | None
    """Inputs of the same tokens on the reference stream; needed for codes in closed form alone."""
    residuals: TokenStore
    """The residuals of all tokens, which change with each finished expert."""
    weights: LossWeights
    settings: BlockSettings
    compute: Compute
    warn: Callable[[RunWarning], None]
    """Called with warnings."""
    all_tokens: bool = False
    """Whether the starting scales are found from all tokens of the block."""

    def reconstruct(
        self, number: int, tokens: Tensor, gates: Tensor, order: torch.Generator, rounding: torch.Generator
    ) -> ExpertResult:
        """Read an expert, reconstruct it, and let it go. The residuals are updated, so experts must come in order.

        Args:
            number: number of the expert.
            tokens: numbers of its tokens, int64 [T], ascending.
            gates: weights of the router for them, float32 [T].
            order: gives the order of the segments.
            rounding: gives random starting values.

        Raises:
            InputError: a weight cannot be read, or gives values that are not finite.
        """
        firsts, config = self._firsts(tokens), self.settings.reconstruction
        training, _ = split_held_out(len(firsts) - 1)
        undersampled = sum(firsts[segment + 1] - firsts[segment] for segment in training) < FEWEST_TOKENS
        closed_form = method_of(config).closed_form
        if undersampled and not closed_form:
            config = replace(config, rounding="nearest")
        settings = replace(self.settings, reconstruction=config)
        trim_heap()  # see `add_experts`
        block = self._read(number)
        target_TD = self._watched_targets(block, tokens, gates, settings, sampled=undersampled)
        block.start(settings, rounding)
        data = self._data(tokens, gates, target_TD, config)
        state, codes = block.state(), None
        if closed_form:
            if self.reference is None:
                raise ValueError("codes in closed form need the inputs on the reference stream")
            stages = ExpertStages(
                block, self.reference, self.routed.x, tokens, gates, firsts, self._sample(), self.compute
            )
            codes = partial(round_in_closed_form, stages, config, self.warn)
        result = reconstruct([block], data, order, lambda block: state, codes)
        weights = dict(block.harden())
        self._take_off(tokens, gates, target_TD, partial(run_blocks, [block], phase=Phase.HARD))
        return ExpertResult(weights, len(tokens), undersampled, result, block.sqnr_db, block.vanished)

    def pass_over(self, number: int, tokens: Tensor, gates: Tensor, finished: WeightSource) -> None:
        """Update the residuals for an expert that an interrupted process finished, as `reconstruct` did.

        Args:
            number: number of the expert.
            tokens: numbers of its tokens, int64 [T], ascending.
            gates: weights of the router for them, float32 [T].
            finished: source of its finished weights.
        """
        trim_heap()
        dtypes = dict.fromkeys(self.experts.layers(number), self.compute.dtype)
        target_TD = self._targets(self._read(number), tokens, gates)
        expert = self.experts.read(number, finished, self.compute.device, dtypes)
        self._take_off(tokens, gates, target_TD, partial(self.experts.module.output, expert))

    def _read(self, number: int) -> ResidentBlock:
        experts, compute = self.experts, self.compute
        prefix = f"{experts.name}.{number}."
        chosen = {name: self.schemes[prefix + name] for name in experts.layers(number) if prefix + name in self.schemes}
        dtypes = {name: None if name in chosen else compute.dtype for name in experts.layers(number)}
        expert = experts.read(number, self.source, compute.device, dtypes)
        layers, norm = replace_linears(expert, chosen, self.settings.scratch), experts.module.norm
        module = expert if norm is None else nn.Sequential(expert, norm)
        return ResidentBlock(number, module, BlockArguments({}), layers, label=f"{experts.prefix}.{number}")

    def _watched_targets(
        self, block: ResidentBlock, tokens: Tensor, gates: Tensor, settings: BlockSettings, *, sampled: bool
    ) -> Tensor:
        """Targets of the expert. Statistics are gathered from its own tokens, from a sample of all tokens, or from all tokens."""
        if not (self.all_tokens or sampled):
            block.watch_inputs(len(tokens), settings)
            return self._targets(block, tokens, gates)
        target_TD = self._targets(block, tokens, gates)
        seen = torch.arange(len(self.weights.tokens)) if self.all_tokens else self._sample()
        block.watch_inputs(len(seen), settings)
        for (some,) in in_parts(seen):
            run_blocks([block], self._inputs_of(some), Phase.ORIGINAL)
        return target_TD

    def _sample(self) -> Tensor:
        """Numbers of about 1,024 tokens of the block, evenly spaced, int64."""
        total = len(self.weights.tokens)
        return torch.arange(0, total, max(1, total // SAMPLED_TOKENS))

    def _inputs_of(self, tokens: Tensor) -> Tensor:
        return self.routed.x.take(tokens).to(self.compute.device, self.compute.dtype)

    @torch.no_grad()
    def _targets(self, block: ResidentBlock, tokens: Tensor, gates: Tensor) -> Tensor:
        """Targets [T, D] of the weighted outputs of the expert, float32; on the CPU if it has very many tokens."""
        few = len(tokens) * len(self.experts) <= SKEW * self.routed.choices
        place = self.compute.device if few else torch.device("cpu")
        target_TD = torch.empty(len(tokens), self.experts.hidden_size, device=place)
        for part, some, gate in in_parts(target_TD, tokens, gates):
            own_TD = run_blocks([block], self._inputs_of(some), Phase.ORIGINAL).float()
            residual_TD, gate_T = (value.to(self.compute.device) for value in (self.residuals.take(some), gate))
            part.copy_(own_TD * gate_T.unsqueeze(1) + residual_TD)
        return target_TD

    @torch.no_grad()
    def _take_off(self, tokens: Tensor, gates: Tensor, target_TD: Tensor, output: Callable[[Tensor], Tensor]) -> None:
        """Take the weighted outputs of the finished expert off its targets, which leaves the residuals of its tokens."""
        for target, some, gate in in_parts(target_TD, tokens, gates):
            hard_TD, gate_T = output(self._inputs_of(some)).float(), gate.to(self.compute.device)
            self.residuals.replace(some, target.to(self.compute.device) - hard_TD * gate_T.unsqueeze(1))

    def _data(self, tokens: Tensor, gates: Tensor, target_TD: Tensor, config: ReconstructionConfig) -> ExpertData:
        """Inputs and targets of the expert for its tokens, without those that the loss leaves out.

        They are copied to the device once, so that no training step waits for them. Those of an expert with very many stay on the CPU.
        """
        weights, counted = self.weights, self.weights.tokens[tokens] > 0
        if not counted.all():
            tokens, gates, target_TD = tokens[counted], gates[counted], target_TD[counted.to(target_TD.device)]
        values = (
            self.routed.x.take(tokens),
            target_TD,
            gates.unsqueeze(1),
            weights.tokens[tokens],
            weights.power[tokens],
        )
        chosen = _Tokens(*(value.to(target_TD.device) for value in values))
        channels = weights.channels.to(self.compute.device)
        return ExpertData(chosen, self._firsts(tokens), channels, self.compute, config)

    def _firsts(self, tokens: Tensor) -> list[int]:
        """Position in `tokens` of the first token of each segment, and the number of tokens."""
        shape = self.routed.x.shape
        bounds = torch.arange(shape.num_segments + 1) * shape.seq_len
        return [int(position) for position in torch.searchsorted(tokens, bounds)]
