"""The finished model, assembled from the shards of its blocks and the rest of the source."""

import re
from pathlib import Path

import torch

from cbqstream.checkpoint.folder import without_quantization
from cbqstream.checkpoint.tensors import copied, stored_names
from cbqstream.disk import FileDigest
from cbqstream.errors import IdentityError
from cbqstream.packed.block_shard import write_head
from cbqstream.packed.format import quantization_config
from cbqstream.packed.output import assemble, building_folder
from cbqstream.planning.layer_schemes import head_scheme, quantized_share
from cbqstream.report.card import CARD, METRICS, metrics_lines, model_card
from cbqstream.rounding import search_kernels
from cbqstream.rounding.nearest import Nearest
from cbqstream.rounding.rounding import RoundingStart
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.journal import Journal
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import LayerSchemes, path_pattern


def write_result(inputs: RunInputs, journal: Journal, out: Path) -> None:
    """Write the finished model of a run whose windows and epochs are all committed.

    Args:
        inputs: inputs of the run.
        journal: journal of the run.
        out: folder to write; it must not exist, or be empty.

    Raises:
        IdentityError: the source changed since the run began.
        StorageError: the folder cannot be written.
    """
    journal.empty_tmp()
    config, committed = inputs.config, journal.chain.expected_parts()
    shards = {shard: committed[shard].sha256 for shard in journal.chain.shards()}
    journal.chain.require_intact(*shards)
    if inputs.source.fingerprint() != inputs.identity.source_weights:
        raise IdentityError(f"{config.model}: the weights changed since this run began. Restore them.")
    last = len(inputs.meta_model.blocks) - config.keep_last
    quantized = inputs.meta_model.blocks[config.keep_first : last]
    kept = [*inputs.meta_model.blocks[: config.keep_first], *inputs.meta_model.blocks[last:]]
    head = [inputs.meta_model.head] if config.quantize_lm_head else []
    heads = {name for _, name in head}
    layers = {spec.tensors[f"{layer}.weight"] for spec in quantized for layer in spec.linears} | heads
    infos, dense = inputs.meta_model.infos, inputs.meta_model.dense
    replaced = {name for spec in quantized for name in spec.tensors.values()} | heads
    used = frozenset[str]().union(*(stored_names(infos[name]) for name in replaced))
    rest = {name: tensor for name, tensor in dense.items() if used.isdisjoint(stored_names(tensor))}
    beside = copied({name: infos[name] for name in replaced - layers})
    copies = {name: info for name, info in {**dense, **beside}.items() if name in rest or name in beside}
    not_quantized = [
        *(path for path in inputs.meta_model.never_quantized if path not in dict(head)),
        *(f"{spec.prefix}.{name}" for spec in kept for name in spec.linears),
        # by the names of the checkpoint too, which other classes of transformers have, also for heads that this class does not have
        *(name.removesuffix(".weight") for name, info in copies.items() if len(info.shape) > 1),
        *(f"re:{path_pattern(pattern)}$" for pattern in config.ignore),
    ]
    schemes = config.schemes
    if head:
        path, name = inputs.meta_model.head
        written, digest = _write_head(inputs, journal, name)
        shards[written] = digest.sha256
        # the head gets its own target, because inference engines do not match it with the target `Linear`
        schemes = LayerSchemes(
            schemes.default, (*schemes.others, (re.escape(path), head_scheme(config, inputs.meta_model)))
        )
    assemble(
        journal.disk,
        out,
        building_folder(out, journal.chain.run.digest),
        source_folder=Path(config.model),
        source=inputs.source,
        shards=shards,
        rest=rest,
        config={
            **without_quantization(inputs.model),
            "quantization_config": quantization_config(schemes, list(dict.fromkeys(not_quantized))),
        },
        texts=_texts(inputs, journal),
    )


def _write_head(inputs: RunInputs, journal: Journal, name: str) -> tuple[Path, FileDigest]:
    """Round the head to nearest and write its shard into tmp/; `name` is the name of its weight in the source."""
    weight = inputs.source.read(name, device=inputs.compute.device)
    scheme = head_scheme(inputs.config, inputs.meta_model)
    kernels = search_kernels.KERNELS.chosen(inputs.config.reconstruction.kernels, weight.device)
    grid = kernels.search_grid(weight, torch.ones(weight.shape[1], device=weight.device), scheme)
    start = RoundingStart(weight, *grid, scheme, inputs.config.reconstruction, torch.Generator(), Scratch())
    hard = Nearest(start).harden()
    return write_head(journal.disk, journal.building, name, hard, inputs.source.infos[name].dtype)


def _texts(inputs: RunInputs, journal: Journal) -> dict[str, str]:
    """Model card and metrics of the result."""
    original, chain = Path(inputs.config.model) / CARD, journal.chain
    text = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else ""
    share = quantized_share(inputs.config, inputs.meta_model)
    return {CARD: model_card(chain, text, share), METRICS: metrics_lines(chain.reports)}
