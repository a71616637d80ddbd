"""Cost of routed experts that are reconstructed alone, on the tokens that the router sends to them (`run/experts_alone.py`).

The experts of a block are never in memory together. A window holds its block without them. Every original expert is read from the source
in four passes: the reference stream, the targets, the residuals, and the reconstruction. The finished experts are read once, to move the
quantized stream. `benchmarks/mixture_block.py` compares this with runs.
"""

from dataclasses import replace

from cbqstream.config import QuantizeConfig
from cbqstream.models.families import EXPERT
from cbqstream.numerics.slabs import SLAB_WEIGHTS
from cbqstream.planning.closed_form import closed_form_bytes
from cbqstream.planning.memory import (
    HELD,
    STREAM_BYTES,
    WIDTH,
    packed_bytes,
    rounding_cost,
    scale_bytes,
    state_bytes,
)
from cbqstream.planning.sizes import ModelSizes
from cbqstream.planning.work import Extent, Work
from cbqstream.records import MemoryMode
from cbqstream.rounding.registry import method_of
from cbqstream.windows.expert_reconstruction import SKEW
from cbqstream.windows.routed_experts import TOKENS_AT_ONCE
from cbqstream.windows.schedule import split_held_out

_STREAM_PASSES = 6
"""Number of times that a run reads a stream for the inputs, the residuals and the loss weights of the experts of a block."""
EXPERT_PASSES = 4
"""Number of times that a run reads each original expert. It is one more for a block that does more with the sums than add them."""
STORES_IN_FILE = 8
"""Largest number of stores of a value of all tokens in the file of a window, which never shrinks."""
_ROUTED_BYTES = 32
"""Memory for one choice of a router: its number, its weight, and their sorted copies."""


def expert_blocks(config: QuantizeConfig, sizes: ModelSizes, extent: Extent) -> int:
    """Number of blocks whose experts are trained alone."""
    routed = sizes.experts_alone(config)
    return 0 if routed is None else min(routed.num_blocks, extent.quantized)


def packed_experts(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """Size in bytes of the finished experts of a block that are trained alone."""
    routed = sizes.experts_alone(config)
    return 0 if routed is None else packed_bytes(config, routed)


def _tokens(config: QuantizeConfig) -> int:
    """Number of calibration tokens."""
    return config.calibration.num_samples * config.calibration.seq_len


def _store(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """Size of a store of the inputs or the sums of the experts of a block for all tokens."""
    return _tokens(config) * sizes.hidden * STREAM_BYTES


def _chosen(routed: ModelSizes) -> float:
    """Number of experts that a router chooses for a token."""
    return routed.experts * routed.num_experts


def inputs_beside_window(config: QuantizeConfig, sizes: ModelSizes, memory_mode: MemoryMode) -> dict[str, int]:
    """Memory for the sums of experts while the other layers of their block are trained, in bytes by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        memory_mode: memory mode of the run.
    """
    if sizes.experts_alone(config) is None or memory_mode.expert_inputs_on_disk:
        return {}
    return {"inputs of experts": _more(config, 1) * _store(config, sizes)}


def inputs_beside_experts(config: QuantizeConfig, sizes: ModelSizes, memory_mode: MemoryMode) -> dict[str, int]:
    """Memory for the inputs of all experts and the choices of the router while experts are reconstructed, in bytes by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        memory_mode: memory mode of the run.
    """
    routed = sizes.experts_alone(config)
    if routed is None:
        return {}
    found = {"choices of the router": int(_tokens(config) * _chosen(routed) * _ROUTED_BYTES)}
    if not memory_mode.expert_inputs_on_disk:
        found["inputs of experts"] = _more(config, 2) * _store(config, sizes)
    return found


def _more(config: QuantizeConfig, trained: int) -> int:
    """Number for the rounding method, from that for one that is trained: codes in closed form need the inputs of both streams."""
    return trained + method_of(config.reconstruction).closed_form


def stream_passes(config: QuantizeConfig) -> int:
    """Number of times that a run reads a stream for the experts of a block that are reconstructed alone."""
    return _more(config, _STREAM_PASSES)


def one_expert(routed: ModelSizes) -> ModelSizes:
    """Sizes of a model whose blocks have one of the routed experts alone."""
    names = [name for name in routed.layers if (match := EXPERT.search(name)) is not None and match[1] == "0"]
    return replace(routed, layers={name: routed.layers[name] for name in names})


def expert_memory(config: QuantizeConfig, sizes: ModelSizes, device: str) -> dict[str, int]:
    """Memory of the computation for one expert with its tokens, and for the finished experts of its group, in bytes by purpose.

    A group has at most 2^26 weights, or one expert. On the CPU, a float32 copy of the weights is counted too.

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
    share, width = together / routed.num_experts, WIDTH[device]
    copy = 4 if device == "cpu" else 0
    learned = rounding_cost(config, routed).resident_bytes + scale_bytes(config, routed, 24)
    step = config.reconstruction.batch_size * config.calibration.seq_len
    tokens = max(TOKENS_AT_ONCE, int(step * min(1.0, SKEW * routed.experts)))
    own = min(_tokens(config), SKEW * _tokens(config) * routed.experts)
    outputs = sum(rows for rows, _ in routed.layers.values()) // routed.num_experts
    found = {} if not method_of(config.reconstruction).closed_form else closed_form_bytes(config, one_expert(routed))
    return found | {
        "tokens of an expert": int(own * sizes.hidden * (STREAM_BYTES + 8)),  # inputs, targets, and targets in parts
        "weights of an expert": int(one * (routed.stored + copy)),
        "rounding of an expert": learned // routed.num_experts,
        "finished experts": int(together * one + share * packed_bytes(config, routed)),  # codes of a byte, and packed
        "activations of an expert": int(HELD[device] * width * tokens * (2 * outputs + 3 * sizes.hidden)),
    }


def expert_disk(config: QuantizeConfig, sizes: ModelSizes, extent: Extent, memory_mode: MemoryMode) -> dict[str, int]:
    """Peak disk space of experts that are reconstructed alone besides their shards, in bytes by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
        memory_mode: memory mode of the run.
    """
    if not expert_blocks(config, sizes, extent):
        return {}
    dense = state_bytes(config, sizes.in_windows(config), 1)
    found = {"finished experts": packed_experts(config, sizes), "other layers of a block": dense}
    if memory_mode.expert_inputs_on_disk:
        found["inputs of experts"] = STORES_IN_FILE * _store(config, sizes)
    return found


def expert_reads(
    config: QuantizeConfig, sizes: ModelSizes, extent: Extent, memory_mode: MemoryMode, passes: float
) -> dict[str, int]:
    """Bytes that are read for experts that are reconstructed alone, by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
        memory_mode: memory mode of the run.
        passes: number of times that the steps of a window read a stream.
    """
    routed, blocks = sizes.experts_alone(config), expert_blocks(config, sizes, extent)
    if routed is None:
        return {}
    found = {
        "source": blocks * EXPERT_PASSES * routed.block_read,
        "finished experts": blocks * 2 * packed_experts(config, sizes),  # for the shard, and for the stream
    }
    if memory_mode.expert_inputs_on_disk:
        # sums of four passes and residuals, once for each expert of a token; sums in four passes over the streams
        each = (_input_passes(config) + 5) * _chosen(routed) + 4 + passes + _all_inputs(config, routed)
        found["inputs of experts"] = int(blocks * _store(config, sizes) * each)
    return found


def _input_passes(config: QuantizeConfig) -> int:
    """Number of times that a token is read for each of its experts.

    For the sums of four passes, targets, training, and the residuals; in closed form, for both streams in two stages.
    """
    return 7 + (4 if method_of(config.reconstruction).closed_form else 0)


def _all_inputs(config: QuantizeConfig, routed: ModelSizes) -> int:
    """Number of times that every token is read for the starting scales of experts, with `--calibrate-all-experts`."""
    return routed.num_experts if config.calibration.all_experts else 0


def expert_writes(config: QuantizeConfig, sizes: ModelSizes, extent: Extent, memory_mode: MemoryMode) -> dict[str, int]:
    """Bytes that are written for experts that are reconstructed alone besides the shards of their blocks, by purpose.

    Experts are written as they are finished, so that a run can be resumed inside a window, and again in the shard of their block. So are
    the other layers of a block.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
        memory_mode: memory mode of the run.
    """
    routed, blocks = sizes.experts_alone(config), expert_blocks(config, sizes, extent)
    if routed is None:
        return {}
    found = {
        "finished experts": blocks * packed_experts(config, sizes),
        "window states": blocks * state_bytes(config, sizes.in_windows(config), 1),
    }
    if memory_mode.expert_inputs_on_disk:
        # inputs, sums of four passes, residuals as a whole and once for each expert of a token
        each = 5 * _chosen(routed) + 1 + _more(config, 3)
        found["inputs of experts"] = int(blocks * _store(config, sizes) * each)
    return found


def expert_copies(config: QuantizeConfig, sizes: ModelSizes, extent: Extent) -> int:
    """Bytes of inputs and outputs of experts that are copied to and from a CUDA device.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
    """
    routed = sizes.experts_alone(config)
    if routed is None:
        return 0
    # inputs and residuals, and outputs in float32 for four sums and the residuals
    each = ((_input_passes(config) + 1) * STREAM_BYTES + 5 * 4) * _chosen(routed)
    each += _all_inputs(config, routed) * STREAM_BYTES
    return int(expert_blocks(config, sizes, extent) * _tokens(config) * sizes.hidden * each)


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
    epochs = settings.epochs if method_of(settings).learns else 0
    runs = 6 + (2 if method_of(settings).closed_form else 0)
    routed = sizes.experts_alone(config)
    every = samples / routed.experts if routed is not None and config.calibration.all_experts else 0.0
    return Work(
        # the sums of four passes, targets, outputs of the finished experts, and the loss on held-out segments; in closed form, inner inputs
        # for both streams
        forward=blocks * (runs * samples + every + 2 * held_out),
        trained=blocks * epochs * training,
        steps=blocks * epochs * -(-training // settings.batch_size),
        hard_batches=0,
        stream_batches=0,
        windows=0,
        blocks=blocks,
        head_segments=0,
    )
