"""Warnings about programs that do not load the result of a run."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version

from cbqstream.config import QuantizeConfig
from cbqstream.evaluation.loading_rules import lacks_rules
from cbqstream.models.families import EXPERT
from cbqstream.models.meta_model import MetaModel
from cbqstream.packed.layouts import layout_of
from cbqstream.packed.pack_quantized import PackQuantized
from cbqstream.planning.layer_schemes import layer_schemes
from cbqstream.scheme import Scheme


def engine_warnings(config: QuantizeConfig, meta_model: MetaModel) -> Iterator[str]:
    """Sentences about programs that do not load the result of a run.

    Args:
        config: settings of the run.
        meta_model: the model.
    """
    experts = _unusual_experts({_expert_formats(layers) for layers in _layers_of_expert_blocks(config, meta_model)})
    if experts is not None:
        remedy = "Load the result with another program, or export it with --format dense."
        yield f"{experts}, which transformers 5.24 does not load. {remedy}"
    elif lacks_rules(meta_model):
        kind = meta_model.config.model_type
        yield (
            f"transformers {version('transformers')} has no rules that read a quantized {kind} with separate experts or with tensors as"
            " they are published. Load the result with another program; check --load gives transformers the rules."
        )
    found = (layout_of(scheme).warning(scheme) for scheme in config.schemes.all)
    yield from dict.fromkeys(text for text in found if text is not None)


def _layers_of_expert_blocks(config: QuantizeConfig, meta_model: MetaModel) -> Iterator[Mapping[str, Scheme]]:
    """Schemes of the quantized layers of each block that has experts."""
    first, stop = config.keep_first, len(meta_model.blocks) - config.keep_last
    for spec in meta_model.blocks:
        if any(EXPERT.search(name) for name in spec.linears):
            yield layer_schemes(config, spec) if first <= spec.index < stop else {}


def _expert_formats(layers: Mapping[str, Scheme]) -> frozenset[str]:
    """Formats of the quantized experts of a block."""
    return frozenset(layout_of(scheme).format for name, scheme in layers.items() if EXPERT.search(name))


def _unusual_experts(formats: set[frozenset[str]]) -> str | None:
    """A clause that says how experts are stored, if transformers does not load them so, or None.

    transformers has one rule for the experts of all blocks, and it finds the codes of experts under one name only.

    Args:
        formats: formats of the quantized experts of a block, for each block that has experts.
    """
    if formats <= {frozenset({PackQuantized.format})}:
        return None
    names = sorted(frozenset[str]().union(*formats))
    if not names:
        return "the experts are in full precision and other layers are not"
    if frozenset() in formats:
        return "the experts of some blocks are quantized and those of others are not"
    return f"the experts are stored as {' and '.join(names)}"
