"""Cost of routed experts that are trained alone, on the tokens that the router sends to them.

The experts of a block are never in memory together. A window holds its blocks without them. For each block, every original expert is read
from the source once for each of these passes: the reference stream through the block when it is new, the targets of every window that
holds it, the residual from which training starts, and training. The finished experts are read once, to move the quantized stream. Each of
these passes goes over all tokens once, expert by expert. Nothing of this was compared with a run yet.
"""

from cbqstream.config import QuantizeConfig
from cbqstream.numerics.input_statistics import Statistic
from cbqstream.numerics.slabs import SLAB_WEIGHTS
from cbqstream.planning.memory import HEAP, STREAM_BYTES, packed_bytes, rounding_cost, scale_bytes
from cbqstream.planning.sizes import ModelSizes
from cbqstream.planning.work import Extent, Work
from cbqstream.records import MemoryMode
from cbqstream.rounding.registry import method_of
from cbqstream.windows.schedule import split_held_out

_FIXED_PASSES = 3
"""Passes over the original experts of a block besides the targets: reference stream, starting residual and training."""
_RESIDUAL = 4
"""Size of a value of the residuals, which are float32."""


def expert_blocks(config: QuantizeConfig, sizes: ModelSizes, extent: Extent) -> int:
    """Number of blocks whose experts are trained alone."""
    routed = sizes.experts_alone(config)
    return 0 if routed is None else min(routed.num_blocks, extent.quantized)


def packed_experts(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """Size in bytes of the finished experts of a block that are trained alone."""
    routed = sizes.experts_alone(config)
    return 0 if routed is None else packed_bytes(config, routed)


def expert_passes(extent: Extent) -> int:
    """Number of times that a run reads each original expert."""
    return _FIXED_PASSES + extent.in_window


def _width(device: str) -> int:
    """Size of a value of the compute dtype."""
    return 2 if device == "cuda" else 4


def _tokens(config: QuantizeConfig) -> int:
    """Number of calibration tokens."""
    return config.calibration.num_samples * config.calibration.seq_len


def _inputs_bytes(config: QuantizeConfig, sizes: ModelSizes, device: str) -> int:
    """Size of the inputs and the residuals [T, D] of the experts of a block."""
    return _tokens(config) * sizes.hidden * (_width(device) + _RESIDUAL)


def expert_host_memory(
    config: QuantizeConfig, sizes: ModelSizes, device: str, memory_mode: MemoryMode
) -> dict[str, int]:
    """Resident memory besides that of the computation, in bytes by purpose: inputs and residuals of all tokens.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        device: `cpu` or `cuda`.
        memory_mode: memory mode of the run.
    """
    if sizes.experts_alone(config) is None or memory_mode.expert_inputs_on_disk:
        return {}
    return {"inputs of experts": _inputs_bytes(config, sizes, device)}


def expert_memory(config: QuantizeConfig, sizes: ModelSizes, device: str) -> dict[str, int]:
    """Memory of the computation for the experts that are trained together, in bytes by purpose.

    They have at most 2^26 weights, or are one expert. On the CPU, a float32 copy of the weights is counted too.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        device: `cpu` or `cuda`.
    """
    routed = sizes.experts_alone(config)
    if routed is None:
        return {}
    one = routed.weights // routed.num_experts
    together = min(routed.num_experts, max(1, SLAB_WEIGHTS // one))
    share, width = together / routed.num_experts, _width(device)
    copy = 4 if device == "cpu" else 0
    learned = rounding_cost(config, routed).resident_bytes + scale_bytes(config, routed, 24)
    if Statistic.GRAM in method_of(config.reconstruction).statistics:
        learned += sum(4 * columns * columns for _, columns in routed.layers.values())
    step = config.reconstruction.batch_size * config.calibration.seq_len
    outputs = sum(rows for rows, _ in routed.layers.values()) // routed.num_experts
    return {
        "weights of experts": int(together * one * (routed.stored + copy)),
        "rounding of experts": int(share * learned),
        "finished experts": int(share * packed_bytes(config, routed)),
        "activations of experts": int(HEAP * width * step * (2 * outputs + 3 * sizes.hidden)),
    }


def _stores(config: QuantizeConfig, sizes: ModelSizes, extent: Extent) -> tuple[int, int, int]:
    """Stores of outputs of experts: their size in bytes, the number for windows, and the number for blocks that leave.

    A window stores the output of the original experts of each of its blocks. A block that leaves stores the target of its experts.
    """
    blocks = expert_blocks(config, sizes, extent)
    return _tokens(config) * sizes.hidden * STREAM_BYTES, blocks * extent.in_window, blocks


def expert_disk(
    config: QuantizeConfig, sizes: ModelSizes, extent: Extent, memory_mode: MemoryMode, device: str
) -> dict[str, int]:
    """Peak disk space of experts that are trained alone besides their shards, in bytes by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
        memory_mode: memory mode of the run.
        device: `cpu` or `cuda`.
    """
    blocks = expert_blocks(config, sizes, extent)
    if not blocks:
        return {}
    size, _, _ = _stores(config, sizes, extent)
    on_disk = memory_mode.expert_inputs_on_disk
    return {
        "outputs of experts": size * (min(extent.in_window, blocks) + 1),
        "finished experts": packed_experts(config, sizes),
    } | ({"inputs of experts": _inputs_bytes(config, sizes, device)} if on_disk else {})


def expert_reads(
    config: QuantizeConfig, sizes: ModelSizes, extent: Extent, memory_mode: MemoryMode, device: str, passes: float
) -> dict[str, int]:
    """Bytes that are read for experts that are trained alone, by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
        memory_mode: memory mode of the run.
        device: `cpu` or `cuda`.
        passes: number of times that the steps of a window read a stream.
    """
    routed, blocks = sizes.experts_alone(config), expert_blocks(config, sizes, extent)
    if routed is None:
        return {}
    size, in_windows, leaving = _stores(config, sizes, extent)
    found = {
        "source": blocks * expert_passes(extent) * routed.block_read,
        "finished experts": blocks * packed_experts(config, sizes),
        "outputs of experts": int(size * (in_windows * passes + leaving)),
    }
    if memory_mode.expert_inputs_on_disk:
        values = _gathered(config, sizes, extent)
        found["inputs of experts"] = blocks * values * (_width(device) + _RESIDUAL)
    return found


def expert_writes(
    config: QuantizeConfig, sizes: ModelSizes, extent: Extent, memory_mode: MemoryMode, device: str
) -> dict[str, int]:
    """Bytes that are written for experts that are trained alone besides the shards of their blocks, by purpose.

    Experts are written as they are finished, so that a run can be resumed inside a window, and again in the shard of their block.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
        memory_mode: memory mode of the run.
        device: `cpu` or `cuda`.
    """
    blocks = expert_blocks(config, sizes, extent)
    if not blocks:
        return {}
    size, in_windows, leaving = _stores(config, sizes, extent)
    found = {
        "finished experts": blocks * packed_experts(config, sizes),
        "outputs of experts": size * (in_windows + leaving),
    }
    if memory_mode.expert_inputs_on_disk:
        residuals = _gathered(config, sizes, extent) * _RESIDUAL
        found["inputs of experts"] = blocks * (_inputs_bytes(config, sizes, device) + residuals)
    return found


def expert_copies(config: QuantizeConfig, sizes: ModelSizes, extent: Extent) -> int:
    """Bytes of inputs and residuals of experts that are copied to a CUDA device, and residuals that are copied back.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
    """
    values = expert_blocks(config, sizes, extent) * _gathered(config, sizes, extent)
    return values * (_width("cuda") + 2 * _RESIDUAL)


def _gathered(config: QuantizeConfig, sizes: ModelSizes, extent: Extent) -> int:
    """Number of values that the passes over the experts of a block gather: the row of a token once for each of its experts."""
    routed = sizes.experts_alone(config)
    chosen = 0.0 if routed is None else routed.experts * routed.num_experts
    return int((expert_passes(extent) + 1) * chosen * _tokens(config) * sizes.hidden)


def expert_work(config: QuantizeConfig, sizes: ModelSizes, extent: Extent) -> Work:
    """Work of experts that are trained alone, in passes of a segment through the experts of a block.

    Experts are trained once for each block, and take as many steps as a window.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
    """
    blocks, settings = expert_blocks(config, sizes, extent), config.reconstruction
    samples = config.calibration.num_samples
    training, held_out = (len(part) for part in split_held_out(samples))
    epochs, whole_model = (settings.epochs, settings.end_to_end_epochs) if method_of(settings).learns else (0, 0)
    return Work(
        forward=blocks * ((expert_passes(extent) + 1) * samples + whole_model * (training + 2 * held_out)),
        trained=blocks * (epochs + whole_model) * training,
        steps=blocks * epochs * -(-training // settings.batch_size),
        hard_batches=0,
        stream_batches=0,
        windows=0,
        blocks=blocks,
        head_segments=0,
    )
