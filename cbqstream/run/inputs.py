"""The inputs of a run, opened and checked before anything is written."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbqstream.calibration.segments import segments_digest
from cbqstream.checkpoint.decoding import decoded_tensors
from cbqstream.checkpoint.folder import find_tensors, read_json
from cbqstream.checkpoint.verified import VerifiedCheckpoint
from cbqstream.config import QuantizeConfig
from cbqstream.disk import Measure, unmeasured
from cbqstream.models.meta_model import MetaModel
from cbqstream.packed.layouts import newer_formats
from cbqstream.planning.advice import advice, is_absurd
from cbqstream.planning.layer_schemes import layer_schemes
from cbqstream.planning.plan import fitting_plan, smaller_plans
from cbqstream.planning.requirements import checked_model, load_calibration, require_paths
from cbqstream.planning.sizes import ModelSizes
from cbqstream.records import Compute, Window
from cbqstream.rounding.registry import method_of
from cbqstream.rundir.identity import Identity
from cbqstream.runtime.device import compute_dtype, numerics_of
from cbqstream.scheme import Scheme
from cbqstream.windows.read_block import routed_experts_of
from cbqstream.windows.routed_experts import expert_layers
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
    advice: tuple[str, ...] = ()
    """Sentences about the disk traffic of the run."""

    @property
    def stream_shape(self) -> tuple[int, int, int]:
        """Shape of a stream of hidden states: segments, tokens in a segment, hidden size."""
        num_segments, seq_len = self.tokens.shape
        return num_segments, seq_len, self.meta_model.hidden_size

    def layers(self, index: int) -> dict[str, Scheme]:
        """Schemes of the quantized layers of block `index`, by their name in the block."""
        return layer_schemes(self.config, self.meta_model.blocks[index])

    def experts_alone(self, index: int) -> str | None:
        """Name of the module of the experts of block `index`, if they are reconstructed alone; None if it has none."""
        return routed_experts_of(self.meta_model, index) if self.config.reconstruction.experts == "alone" else None

    def weights_alone(self, index: int) -> list[str]:
        """Names in the checkpoint of the weights of the experts of block `index` that are reconstructed alone."""
        experts, spec = self.experts_alone(index), self.meta_model.blocks[index]
        return [] if experts is None else [spec.tensors[f"{name}.weight"] for name in expert_layers(spec, experts)]

    def reading_ahead(self, position: int) -> AbstractContextManager[None]:
        """Read the new blocks of window `position` into the page cache in the background, while the window before it is quantized."""
        coming = self.windows[position : position + 1]
        blocks = [block for window in coming for block in self.meta_model.blocks[window.frontier : window.stop]]
        alone = {
            name for block in blocks for name in self.weights_alone(block.index)
        }  # read when each expert needs them
        names = [name for block in blocks for name in block.tensors.values() if name not in alone]
        return self.source.reading_ahead(names)

    @property
    def num_epochs(self) -> int:
        """Number of epochs of the end-to-end stage."""
        settings = self.config.reconstruction
        return settings.end_to_end_epochs if method_of(settings).learns else 0


def open_inputs(
    config: QuantizeConfig,
    device: torch.device,
    threads: int,
    measure: Measure = unmeasured,
    *,
    allow_partial: bool = False,
    allow_links: bool = False,
) -> RunInputs:
    """Open and check the inputs of a run, without writing anything.

    Args:
        config: settings of the run.
        device: device that computes.
        threads: number of CPU threads.
        measure: measures the time of reading the source.
        allow_partial: accept a model most of whose block weights cannot be quantized.
        allow_links: read shards of the source that are links to files outside its folder.

    Raises:
        UsageError: settings do not fit the model, or paths collide.
        InputError: the model or the calibration data cannot be used.
        DeviceMemoryError: the run does not fit the memory limits.
    """
    folder = Path(config.model)
    model = read_json(folder, "config.json")
    require_paths(config)
    stored = find_tensors(folder, allow_links=allow_links)
    dense = decoded_tensors(folder, model, stored)
    meta_model = checked_model(config, model, dense, device, allow_partial=allow_partial)
    source = VerifiedCheckpoint(meta_model.infos, stored, measure)
    tokens_NS = load_calibration(config, meta_model)
    identity = Identity.of(
        config,
        model=model,
        weights=source.fingerprint(),
        tokens=segments_digest(tokens_NS),
        numerics=numerics_of(device, threads),
        formats=newer_formats(config.schemes),
    )
    windows = tuple(schedule(config.keep_first, len(meta_model.blocks) - config.keep_last, config.window))
    sizes = ModelSizes.of(meta_model)
    plan = fitting_plan(config, sizes, device.type)
    smaller = smaller_plans(config, sizes, device.type) if is_absurd(plan) else {}
    compute = Compute(device, compute_dtype(device), config.reconstruction.batch_size, plan.memory_mode)
    return RunInputs(
        config, model, source, meta_model, tokens_NS, windows, compute, identity, tuple(advice(plan, smaller))
    )
