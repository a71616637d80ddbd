"""Requirements of a run on its model, settings and dataset. A plan and a run check them alike, before anything is written."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbqstream.calibration.segments import load_segments
from cbqstream.checkpoint.decoding import decoded_tensors
from cbqstream.checkpoint.folder import find_tensors, read_json, refuse_adapter
from cbqstream.checkpoint.header import described
from cbqstream.checkpoint.tensors import DerivedTensor, ModelTensor
from cbqstream.config import QuantizeConfig
from cbqstream.disk import is_occupied
from cbqstream.errors import InputError, UsageError, some_shown
from cbqstream.hub import fetch_headers, is_name
from cbqstream.models.meta_model import MetaModel
from cbqstream.models.probe import probe
from cbqstream.packed.output import require_replaceable
from cbqstream.planning.layer_schemes import require_quantizable
from cbqstream.rounding import search_kernels
from cbqstream.rounding.registry import method_of
from cbqstream.rundir.chain import is_run

_NAMED = 5
"""Number of layers that a warning names."""


def read_headers(
    model: str, revision: str | None = None, *, allow_links: bool = False
) -> tuple[dict[str, Any], Mapping[str, ModelTensor]]:
    """Content of config.json, and every tensor by name, from headers alone. Quantized weights are decoded when they are read.

    Args:
        model: folder of the model, or its name on the Hub, from which only headers and config.json are fetched.
        revision: branch, tag or commit of a model on the Hub; None is the default branch.
        allow_links: read shards that are links to files outside the folder.

    Raises:
        InputError: the model cannot be read or fetched, or is quantized in a way that is not read.
    """
    if not is_name(model, revision):
        folder = Path(model)
        found = read_json(folder, "config.json")
        return found, decoded_tensors(folder, found, find_tensors(folder, allow_links=allow_links))
    folder, headers = fetch_headers(model, revision, refuse_adapter)
    found = read_json(folder, "config.json")
    infos = {key: info for file, held in headers.items() for key, info in described(Path(model, file), held).items()}
    return found, decoded_tensors(folder, found, infos)


def checked_model(
    config: QuantizeConfig,
    model: dict[str, Any],
    infos: Mapping[str, ModelTensor],
    device: torch.device,
    *,
    allow_partial: bool = False,
) -> MetaModel:
    """The model of a run, after all checks that need only headers and settings.

    Args:
        config: settings of the run.
        model: content of config.json of the source.
        infos: dense tensors of the source, by name.
        device: device that will compute.
        allow_partial: accept a model most of whose block weights cannot be quantized.

    Raises:
        UsageError: the settings do not fit the model.
        InputError: the model cannot be quantized.
        DeviceMemoryError: there is not enough memory to try the code of the model.
    """
    folder, settings, seq_len = Path(config.model), config.reconstruction, config.calibration.seq_len
    meta_model = MetaModel(folder, model, infos, config.blocks_path)
    _require_own_weights(meta_model)
    probe(meta_model)
    require_quantizable(config, meta_model, allow_partial=allow_partial)
    method_of(settings).require_runnable(settings, device)
    if settings.init == "search" or config.quantize_lm_head:
        search_kernels.KERNELS.require(settings.kernels, device)
    meta_model.check_length(seq_len)
    if settings.robust_tokens >= seq_len:
        raise UsageError(f"robust_tokens is {settings.robust_tokens}. It must be below seq_len, {seq_len}.")
    return meta_model


def _require_own_weights(meta_model: MetaModel) -> None:
    """Check that no two blocks have the same weights, because each block is quantized and stored by itself.

    Raises:
        InputError: two blocks have the same weights.
    """
    owners: dict[str, int] = {}
    for spec in meta_model.blocks:
        for name in set(spec.tensors.values()):
            if owners.setdefault(name, spec.index) != spec.index:
                problem = f"block {spec.index} has weights of block {owners[name]}, and such blocks cannot be quantized"
                raise InputError(meta_model.folder, f"{problem}. Use another model.")


def load_calibration(config: QuantizeConfig, meta_model: MetaModel) -> Tensor:
    """Calibration segments of a run, token ids int64 [N, S].

    Args:
        config: settings of the run.
        meta_model: the model, whose folder has the tokenizer.

    Raises:
        InputError: the dataset cannot be read, or has too few tokens.
    """
    calibration = config.calibration
    return load_segments(
        Path(calibration.dataset),
        meta_model.folder,
        num_samples=calibration.num_samples,
        seq_len=calibration.seq_len,
        vocab_size=meta_model.vocab_size,
        begun=True,
    )


def source_warnings(model: str, meta_model: MetaModel) -> Iterator[str]:
    """Sentences about weights of the source that are quantized already, and about layers that cannot be quantized."""
    decoded = sum(isinstance(info, DerivedTensor) for info in meta_model.dense.values())
    if decoded:
        yield (
            f"{model}: {decoded:,} of its {len(meta_model.dense):,} tensors are quantized already. They are decoded as they are read;"
            " what they lost is not restored."
        )
    by_reason: dict[str, dict[str, None]] = {}
    for left_out in meta_model.left_out:
        for name, reason in left_out.items():
            by_reason.setdefault(reason, {})[name] = None
    for reason, names in by_reason.items():
        yield f"{model}: stays in full precision, because it {reason}: {some_shown([*names], _NAMED)}."


def require_paths(config: QuantizeConfig) -> None:
    """Check that model, OUT and run directory are not inside each other, that their parent folders exist, and that OUT is free.

    OUT of a run that was begun is not checked.

    Args:
        config: settings of the run.

    Raises:
        UsageError: two of them collide, a folder does not exist, or OUT is not empty.
    """
    model, out, run = (Path(path).resolve() for path in (config.model, config.out, config.run_path))
    for inner, outer, text in (
        (out, model, "OUT is inside the model"),
        (run, model, "the run directory is inside the model"),
        (run, out, "the run directory is inside OUT"),
        (out, run, "OUT is inside the run directory"),
    ):
        if inner == outer or outer in inner.parents:
            raise UsageError(f"{inner}: {text}. Use another folder.")
    require_replaceable(Path(config.out))
    for parent in (out.parent, run.parent):
        if not parent.is_dir():
            raise UsageError(f"{parent}: no such folder. Create it first.")
    if not is_run(config.run_path) and is_occupied(Path(config.out)):
        raise UsageError(f"{config.out}: exists and is not empty. Give another OUT.")
