"""The routed experts of one block, reconstructed in groups, each of which is a durable result inside the window (`rundir/partial.py`)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from cbqstream.activations.store import ActivationStore, StreamShape
from cbqstream.activations.token_store import TokenStore
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import ScratchFile
from cbqstream.errors import InputError
from cbqstream.numerics.slabs import SLAB_WEIGHTS
from cbqstream.packed.layouts import encode
from cbqstream.packed.shard import write_tensors
from cbqstream.records import RunNotice, RunWarning
from cbqstream.rounding.registry import method_of
from cbqstream.run.finished import finished_weights
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.partial import PartialResult, PartialResults
from cbqstream.runtime.seeds import generator_for
from cbqstream.windows.expert_reconstruction import ExpertInputs, ExpertResult, LossWeights
from cbqstream.windows.propagate import route
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.reconstruct import NOT_FINITE, Reconstruction
from cbqstream.windows.resident_block import BlockSettings, ResidentBlock
from cbqstream.windows.residuals import factor_of_sums, replace_sums_by_residuals
from cbqstream.windows.routed_experts import Routed, RoutedExperts, add_experts

_MOST_REVERTED = 0.1
"""Largest accepted share of experts of a block whose loss was not finite."""


def token_shape(inputs: RunInputs, experts: RoutedExperts) -> StreamShape:
    """Shape of a store of the inputs or the sums of the experts of a block."""
    return StreamShape(len(inputs.tokens), inputs.tokens.shape[1], experts.hidden_size)


@dataclass(frozen=True, slots=True)
class FinishedExperts:
    """The finished experts of a block."""

    layers: Mapping[str, Checkpoint]
    """File that holds each quantized layer, encoded, by the name of the layer in the block."""
    facts: Mapping[str, Mapping[str, Any]]
    """Facts about each expert by its path in the block, see `_facts`."""

    def tell(self, block: ResidentBlock) -> None:
        """Record the facts in the block, from which the report of the window is made."""
        for path, found in self.facts.items():
            names = [name for name in self.layers if name.startswith(f"{path}.")]
            block.tokens[f"{path}.up_proj"] = found["tokens"]
            block.sqnr_db |= {f"{path}.{name}": value for name, value in found["sqnr_db"].items()}
            block.vanished |= {f"{path}.{name}": value for name, value in found["vanished"].items()}
            block.undersampled.update(names if found["undersampled"] else ())

    @staticmethod
    def added_to(result: Reconstruction, finished: "FinishedExperts") -> Reconstruction:
        """The result of a window, with finished experts in the share of changed codes."""
        codes = result.codes + sum(found["codes"] for found in finished.facts.values())
        moved = result.changed * result.codes + sum(
            found["changed"] * found["codes"] for found in finished.facts.values()
        )
        return replace(result, changed=moved / max(codes, 1), codes=codes)

    def notice(self, prefix: str) -> RunNotice:
        """Sentence about the losses of the experts of a block with a module path."""
        number, reverted = len(self.facts), sum(found["reverted"] is not None for found in self.facts.values())
        before, after = (sum(found[key] for found in self.facts.values()) / number for key in ("before", "after"))
        return RunNotice(
            f"{prefix}: {number} experts alone, mean loss {before:.3g} -> {after:.3g}, {reverted} reverted"
        )


NO_EXPERTS = FinishedExperts({}, {})
"""The finished experts of a block that has none, or whose experts are in memory."""


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The routed experts of a block whose other layers are final. They are finished in order, because each corrects those before it."""

    inputs: RunInputs
    settings: BlockSettings
    results: PartialResults
    """Results inside the window."""
    block: ResidentBlock
    experts: RoutedExperts
    routed: Routed
    """Inputs of the experts on the quantized stream."""
    reference: ActivationStore
    """Reference stream at the input of the block."""
    quantized: ActivationStore
    """Quantized stream at the input of the block."""
    targets: ActivationStore
    """Targets for the output of the block."""
    file: ScratchFile | None
    """File of the values of all tokens; None keeps them in memory."""
    doing: Callable[[str], None]
    """Called with the name of each step."""
    warn: Callable[[RunWarning], None]
    """Called with warnings."""

    def finish(self) -> FinishedExperts:
        """Reconstruct the groups that no interrupted process finished.

        Raises:
            InputError: a weight cannot be read, or the loss of many experts was not finite.
            IdentityError: the source changed.
        """
        layers, facts = dict[str, Checkpoint](), dict[str, Mapping[str, Any]]()
        for group, found in self._all_results().items():
            held = Checkpoint(read_header(found.file))
            for number in group:
                told = found.facts["experts"][str(number)]
                facts[f"{self.experts.name}.{number}"] = told
                layers |= {f"{self.experts.name}.{number}.{layer}": held for layer in told["sqnr_db"]}
        _require_finite(self.experts, facts)
        return FinishedExperts(layers, facts)

    def _all_results(self) -> dict[range, PartialResult]:
        """The results of all groups, in order."""
        found = {group: self.results.find(_name_of(group)) for group in self._groups()}
        finished = {group: result for group, result in found.items() if result is not None}
        for group, result in finished.items():
            self.inputs.source.expect(self._weights_of(group), result.facts["source"])
        if len(finished) == len(found):
            return finished
        given, parts = self._given(), self.routed.by_expert(len(self.experts))
        results = dict[range, PartialResult]()
        for group in found:
            if group not in finished:
                results[group] = self._reconstructed(given, group, parts)
                continue
            results[group] = finished[group]
            source = finished_weights(self.inputs, self._weights_of(group), finished[group].file)
            for number in group:
                given.pass_over(number, *parts[number], source)
        return results

    def _given(self) -> ExpertInputs:
        """Everything from which the experts are reconstructed, before the first one."""
        inputs, config, compute = self.inputs, self.settings.reconstruction, self.inputs.compute
        closed_form = method_of(config).closed_form
        factor = factor_of_sums(self.block, self.experts, self.quantized, compute)
        residuals = TokenStore(token_shape(inputs, self.experts), self.file, zeros=True)
        add = partial(add_experts, self.experts, source=inputs.source, compute=compute, sums=residuals)
        reference = None
        if not factor or closed_form:
            store = TokenStore(token_shape(inputs, self.experts), self.file)
            reference = route(self.block, self.reference, store, compute, phase=Phase.ORIGINAL)
        if factor:
            add(self.routed)
            streams = self.quantized, self.targets, residuals
            replace_sums_by_residuals(self.block, self.experts, *streams, compute, factor=factor)
        elif reference is not None:  # what the sums lack to the mixed target of the sums themselves
            add(reference, share=config.target_mix)
            add(self.routed, share=-config.target_mix)
        return ExpertInputs(
            self.experts,
            inputs.source,
            inputs.layers(self.block.index),
            self.routed,
            reference.x if reference is not None and closed_form else None,
            residuals,
            LossWeights.of(self.targets, config, self.experts.hidden_size),
            self.settings,
            compute,
            self.warn,
            inputs.config.calibration.all_experts,
        )

    def _reconstructed(
        self, given: ExpertInputs, group: range, parts: Sequence[tuple[Tensor, Tensor]]
    ) -> PartialResult:
        """Reconstruct a group of experts, and make its result durable."""
        seed, index, source = self.inputs.config.seed, self.block.index, self.inputs.source
        self.doing(f"experts {group.start}-{group.stop - 1} of {len(self.experts)}")
        made = dict[int, ExpertResult]()
        for number in group:
            generators = [generator_for(seed, index, f"expert {number}: {what}") for what in ("order", "rounding")]
            made[number] = given.reconstruct(number, *parts[number], *generators)
        write = partial(write_tensors, self.results.disk, tensors=dict(self._encoded(made)))
        facts = {"experts": {str(number): _facts(result) for number, result in made.items()}}
        return self.results.add(_name_of(group), write, facts | {"source": source.digests_of(self._weights_of(group))})

    def _encoded(self, made: Mapping[int, ExpertResult]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each tensor of finished experts, as they are stored in the result."""
        for number, result in made.items():
            for layer, weight in result.weights.items():
                stored = self.experts.layers(number)[layer]
                for part, value in encode(weight, scale_dtype=self.inputs.source.infos[stored].dtype).items():
                    yield f"{stored.removesuffix('.weight')}.{part}", value

    def _groups(self) -> Iterator[range]:
        """Numbers of the experts of each group."""
        infos = self.inputs.meta_model.infos
        weights = sum(math.prod(infos[name].shape) for name in self.experts.layers(0).values())
        number = max(1, SLAB_WEIGHTS // weights)
        for first in range(0, len(self.experts), number):
            yield range(first, min(first + number, len(self.experts)))

    def _weights_of(self, group: range) -> list[str]:
        """Names in the checkpoint of the weights of a group."""
        return [weight for number in group for weight in self.experts.layers(number).values()]


def _name_of(group: range) -> str:
    """Name of the result of a group of experts."""
    return f"experts-{group.start:05d}"


def _require_finite(experts: RoutedExperts, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that training did not fail for many experts of a block. Otherwise most of them would be rounded to nearest.

    Raises:
        InputError: the loss was NaN or infinite for more than one expert and for more than a tenth of them.
    """
    failed = [path for path, found in facts.items() if found["reverted"] == NOT_FINITE]
    if len(failed) > max(1, _MOST_REVERTED * len(facts)):
        raise InputError(
            experts.prefix,
            f"the loss of {len(failed)} of {len(facts)} experts was not finite, first of {failed[0]}."
            " Use a smaller --max-shift or --scale-lr in a new run.",
        )


def _facts(result: ExpertResult) -> dict[str, Any]:
    """Plain values about a finished expert."""
    learned = result.reconstruction
    return {
        "tokens": result.tokens,
        "undersampled": result.undersampled,
        "before": learned.loss_before,
        "after": learned.loss_after,
        "reverted": learned.reverted,
        "changed": learned.changed,
        "codes": learned.codes,
        "sqnr_db": dict(result.sqnr_db),
        "vanished": dict(result.vanished),
    }
