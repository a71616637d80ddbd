"""Everything a run is given, opened and checked before a byte is written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cbqstream.calibration.segments import load_segments, segments_digest
from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.verified import RunSource
from cbqstream.config import LayerSchemes, QuantizeConfig, Scheme, path_pattern
from cbqstream.disk import FileDigest
from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.families import joined_with
from cbqstream.models.meta_model import MetaModel
from cbqstream.packed.output import require_replaceable
from cbqstream.planning.plan import fitting_plan
from cbqstream.planning.sizes import ModelSizes, require_original
from cbqstream.records import BlockSpec, Compute, EpochReport, TensorInfo, Window, WindowReport
from cbqstream.rounding.straight_through import require_kernels
from cbqstream.rundir.identity import identity
from cbqstream.rundir.journal import Journal
from cbqstream.runtime.device import choose_device, compute_dtype, make_deterministic, numerics_class
from cbqstream.windows.schedule import schedule


@dataclass(frozen=True, slots=True)
class RunInputs:
    """A model, calibration segments and settings that fit together."""

    config: QuantizeConfig
    model: dict[str, Any]
    """Content of the source's config.json."""
    source: RunSource
    meta_model: MetaModel
    tokens: Tensor
    """Calibration segments, int64 [N, S]."""
    windows: tuple[Window, ...]
    compute: Compute
    identity: dict[str, Any]

    @property
    def stream_shape(self) -> tuple[int, int, int]:
        """Of a stream of hidden states: segments, tokens in each, hidden size."""
        num_segments, seq_len = self.tokens.shape
        return num_segments, seq_len, self.meta_model.hidden_size

    def layers(self, index: int) -> dict[str, Scheme]:
        """The layers of a block that are quantized, by their name in it."""
        return layer_schemes(self.config, self.meta_model.blocks[index])

    @property
    def num_epochs(self) -> int:
        """Of learning end to end, after the last window."""
        settings = self.config.reconstruction
        return settings.end_to_end_epochs if settings.rounding != "nearest" else 0

    def commit(
        self,
        journal: Journal,
        *,
        parts: dict[str, FileDigest],
        acts: dict[str, list[list[int]]] | None,
        report: WindowReport | EpochReport,
    ) -> None:
        """Commit what was built in tmp/, with the digests of the source tensors that were read for it. See `Journal.commit`."""
        read, numerics = self.source.uncommitted(), self.identity["numerics"]
        journal.commit(parts=parts, acts=acts, source=read, numerics=numerics, report=report.to_dict())
        self.source.remember(read)


def open_inputs(config: QuantizeConfig) -> RunInputs:
    """Open and check everything. Writes nothing.

    Raises:
        UsageError: settings that do not fit the model, or paths that collide.
        InputError: the model or the calibration data cannot be used.
        DeviceMemoryError: it does not fit the limits of the settings.
    """
    folder = Path(config.model)
    model = read_json(folder, "config.json")
    require_original(folder, model)
    _check_paths(config)
    source = RunSource.open(folder)
    meta_model = MetaModel(folder, model, source.tensors(), config.blocks_path)
    _check_scheme(config, meta_model, source)
    device = choose_device(config.device)
    threads = make_deterministic(config.threads)
    if config.reconstruction.rounding == "signround":
        require_kernels(config.reconstruction.kernels, device)
    meta_model.check_length(config.calibration.seq_len)
    if config.reconstruction.robust_tokens >= config.calibration.seq_len:
        raise UsageError(
            f"robust_tokens {config.reconstruction.robust_tokens} leaves no token of {config.calibration.seq_len}."
        )
    tokens_NS = load_segments(
        Path(config.calibration.dataset),
        folder,
        num_samples=config.calibration.num_samples,
        seq_len=config.calibration.seq_len,
        vocab_size=meta_model.vocab_size,
        begun=True,
    )
    who = identity(
        config,
        model=model,
        weights=source.fingerprint(),
        tokens=segments_digest(tokens_NS),
        numerics=numerics_class(device, threads),
    )
    windows = tuple(schedule(config.keep_first, len(meta_model.blocks) - config.keep_last, config.window))
    plan = fitting_plan(config, ModelSizes.counted(folder, model, source.infos), device.type)
    compute = Compute(device, compute_dtype(device), config.reconstruction.batch_size, plan.memory_mode)
    return RunInputs(config, model, source, meta_model, tokens_NS, windows, compute, who)


def _check_paths(config: QuantizeConfig) -> None:
    model, out, run = (Path(path).resolve() for path in (config.model, config.out, config.run_path))
    for inner, outer, text in (
        (out, model, "OUT is inside the model"),
        (run, model, "the run directory is inside the model"),
        (run, out, "the run directory is inside OUT"),
        (out, run, "OUT is inside the run directory"),
    ):
        if inner == outer or outer in inner.parents:
            raise UsageError(f"{inner}: {text}. Use another place.")
    require_replaceable(Path(config.out))
    for parent in (out.parent, run.parent):
        if not parent.is_dir():
            raise UsageError(f"{parent}: no such folder. Create it first.")


def _check_scheme(config: QuantizeConfig, meta_model: MetaModel, source: RunSource) -> None:
    kept = config.keep_first + config.keep_last
    if kept >= len(meta_model.blocks):
        raise UsageError(
            f"keep_first + keep_last is {kept} and the model has {len(meta_model.blocks)} blocks; nothing is left to quantize."
        )
    _require_meant(config, meta_model)
    if config.quantize_lm_head:
        _require_storable(source.infos[meta_model.head[1]], head_scheme(config, meta_model))
    for spec in meta_model.blocks[config.keep_first : len(meta_model.blocks) - config.keep_last]:
        layers = layer_schemes(config, spec)
        if not layers:
            raise UsageError(
                f"--ignore leaves no layer of {spec.prefix} to quantize. For whole blocks: --keep-first, --keep-last."
            )
        _require_alike(spec, layers)
        for name, scheme in layers.items():
            stored = spec.tensors[f"{name}.weight"]
            _require_storable(source.infos[stored], scheme)


def _require_meant(config: QuantizeConfig, meta_model: MetaModel) -> None:
    """Refuse a pattern that means no module: a slip of the pen would be seen after hours, if at all."""
    paths = [f"{spec.prefix}.{name}" for spec in meta_model.blocks for name in spec.linears]
    stored = [spec.tensors[f"{name}.weight"] for spec in meta_model.blocks for name in spec.linears]
    paths += [name.removesuffix(".weight") for name in (*stored, meta_model.head[1])]
    paths += meta_model.never_quantized
    for pattern in (*config.ignore, *(text.rpartition("=")[0] for text in config.override)):
        if not any(re.fullmatch(path_pattern(pattern), path) for path in paths):
            raise UsageError(
                f'"{shown(pattern)}" means no layer. A path is such as {paths[0]}; whole parts of it, * and ? can be used.'
            )


def layer_schemes(config: QuantizeConfig, spec: BlockSpec) -> dict[str, Scheme]:
    """The layers of a block that are quantized, by their name in it.

    Raises:
        UsageError: a pattern means a layer by its module path and not by its name in the checkpoint, or the other way round.
    """
    found, chosen = {}, config.schemes
    for name in spec.linears:
        scheme = _scheme_of(config, chosen, f"{spec.prefix}.{name}", spec.tensors[f"{name}.weight"])
        if scheme is not None:
            found[name] = scheme
    return found


def head_scheme(config: QuantizeConfig, meta_model: MetaModel) -> Scheme:
    """How the head is quantized.

    Raises:
        UsageError: it is tied to the embeddings, or left in full precision at the same time.
    """
    scheme = _scheme_of(config, config.schemes, *meta_model.head)
    if meta_model.is_head_tied or scheme is None:
        what = "is tied to the embeddings" if meta_model.is_head_tied else "is left in full precision by --ignore"
        raise UsageError(f"the head {what}. Leave out --quantize-lm-head.")
    return scheme


def _scheme_of(config: QuantizeConfig, chosen: LayerSchemes, path: str, weight: str) -> Scheme | None:
    """Of the layer with a module path, whose weight has a name in the checkpoint; None leaves it in full precision."""
    paths = (path, weight.removesuffix(".weight"))
    schemes = [None if config.is_ignored(one) else chosen.of(one) for one in paths]
    if schemes[0] != schemes[1]:
        raise UsageError(
            f"--ignore or --override means {paths[0]} and not {paths[1]}, its name in the checkpoint. Mean both."
        )
    return schemes[0]


def _require_alike(spec: BlockSpec, layers: Mapping[str, Scheme]) -> None:
    """Refuse different schemes in layers that inference engines join."""
    joined: dict[str, str] = {}
    for name in spec.linears:
        first = joined.setdefault(joined_with(name), name)
        if layers.get(first) != layers.get(name):
            raise UsageError(
                f"{spec.prefix}: {first} and {name} are computed as one by inference engines and need one scheme. Name both."
            )


def _require_storable(info: TensorInfo, scheme: Scheme) -> None:
    scheme.require_whole_groups(info.name, info.shape[1])
    if not info.dtype.is_floating_point:
        raise InputError(info.file, f"dtype {info.dtype}; weights must be bf16, fp16 or fp32.", tensor=info.name)
