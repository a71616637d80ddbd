"""The inputs of a run, opened and checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbqstream.calibration.segments import load_segments, segments_digest
from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.verified import VerifiedCheckpoint
from cbqstream.config import QuantizeConfig
from cbqstream.disk import Measure, unmeasured
from cbqstream.errors import UsageError
from cbqstream.models.meta_model import MetaModel
from cbqstream.packed.output import require_replaceable
from cbqstream.planning.plan import fitting_plan
from cbqstream.planning.sizes import ModelSizes, require_original
from cbqstream.records import Compute, Window
from cbqstream.rounding.registry import method_of
from cbqstream.run.layer_schemes import layer_schemes, require_quantizable
from cbqstream.rundir.identity import Identity
from cbqstream.runtime.device import compute_dtype, numerics_of
from cbqstream.scheme import Scheme
from cbqstream.windows.schedule import schedule


@dataclass(frozen=True, slots=True)
class RunInputs:
    """A model, calibration segments and settings that fit together."""

    config: QuantizeConfig
    model: dict[str, Any]
    """Content of config.json of the source."""
    source: VerifiedCheckpoint
    meta_model: MetaModel
    tokens: Tensor
    """Calibration segments, int64 [N, S]."""
    windows: tuple[Window, ...]
    compute: Compute
    identity: Identity

    @property
    def stream_shape(self) -> tuple[int, int, int]:
        """Shape of a stream of hidden states: segments, tokens in a segment, hidden size."""
        num_segments, seq_len = self.tokens.shape
        return num_segments, seq_len, self.meta_model.hidden_size

    def layers(self, index: int) -> dict[str, Scheme]:
        """Schemes of the quantized layers of block `index`, by their name in the block."""
        return layer_schemes(self.config, self.meta_model.blocks[index])

    @property
    def num_epochs(self) -> int:
        """Number of epochs of the end-to-end stage."""
        settings = self.config.reconstruction
        return settings.end_to_end_epochs if method_of(settings).learns else 0


def open_inputs(config: QuantizeConfig, device: torch.device, threads: int, measure: Measure = unmeasured) -> RunInputs:
    """Open and check the inputs of a run, without writing anything.

    Args:
        config: settings of the run.
        device: device that computes.
        threads: number of CPU threads.
        measure: measures the time of reading the source.

    Raises:
        UsageError: settings do not fit the model, or paths collide.
        InputError: the model or the calibration data cannot be used.
        DeviceMemoryError: the run does not fit the memory limits.
    """
    folder = Path(config.model)
    model = read_json(folder, "config.json")
    require_original(folder, model)
    _check_paths(config)
    source = VerifiedCheckpoint(Checkpoint.open(folder), measure)
    meta_model = MetaModel(folder, model, source.tensors(), config.blocks_path)
    require_quantizable(config, meta_model, source.infos)
    method_of(config.reconstruction).require_runnable(config.reconstruction, device)
    meta_model.check_length(config.calibration.seq_len)
    if config.reconstruction.robust_tokens >= config.calibration.seq_len:
        raise UsageError(
            f"robust_tokens is {config.reconstruction.robust_tokens}. It must be below seq_len, {config.calibration.seq_len}."
        )
    tokens_NS = load_segments(
        Path(config.calibration.dataset),
        folder,
        num_samples=config.calibration.num_samples,
        seq_len=config.calibration.seq_len,
        vocab_size=meta_model.vocab_size,
        begun=True,
    )
    identity = Identity.of(
        config,
        model=model,
        weights=source.fingerprint(),
        tokens=segments_digest(tokens_NS),
        numerics=numerics_of(device, threads),
    )
    windows = tuple(schedule(config.keep_first, len(meta_model.blocks) - config.keep_last, config.window))
    plan = fitting_plan(config, ModelSizes.counted(folder, model, source.infos), device.type)
    compute = Compute(device, compute_dtype(device), config.reconstruction.batch_size, plan.memory_mode)
    return RunInputs(config, model, source, meta_model, tokens_NS, windows, compute, identity)


def _check_paths(config: QuantizeConfig) -> None:
    """Check that model, OUT and run directory are not inside each other, and that their parent folders exist.

    Raises:
        UsageError: two of them collide, or a folder does not exist.
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
