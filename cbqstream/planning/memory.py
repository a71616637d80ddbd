"""Memory and disk space that a run will need, from the costs that rounding methods and transforms declare and the sizes of the model."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from cbqstream.activations.read_ahead import READ_DEPTH
from cbqstream.activations.write_behind import WRITE_DEPTH
from cbqstream.config import QuantizeConfig
from cbqstream.numerics.affine import device_tile_bytes
from cbqstream.numerics.losses import HEAD_TOKENS
from cbqstream.numerics.slabs import SLAB_WEIGHTS
from cbqstream.planning.closed_form import closed_form_bytes
from cbqstream.planning.sizes import ModelSizes
from cbqstream.records import MemoryMode
from cbqstream.rounding.cost import RoundingCost
from cbqstream.rounding.registry import method_of
from cbqstream.transforms.registry import active
from cbqstream.transforms.transform import TransformCost
from cbqstream.windows.step_sizes import SEGMENTS_PER_STEP

PROCESS = {"cpu": 480 << 20, "cuda": 2 << 30}
"""Resident memory of a process after all imports and some computation, with torch 2.13 and transformers 5.24; an estimate on CUDA."""
_DECODING = 64 << 20
"""Memory for the rows of a quantized weight that are decoded at once (`checkpoint/decoders`), measured."""
CONTEXT = 700 << 20
"""Device memory of a CUDA context and its workspaces; an estimate."""
HELD = {"cpu": 1.25, "cuda": 1.15}
"""Ratio of the memory that an allocator holds for activations to their size.

On the CPU it is that of glibc, fitted to runs (benchmarks/plan_check.py). On CUDA it is an allowance for the parts of segments that no
tensor fits in: 1.10 to 1.29 in a simulation of the allocator of torch (benchmarks/trace_step.py). Weights and rounding values have none.
"""
WIDTH = {"cpu": 4, "cuda": 2}
"""Size of a value of the dtype in which blocks compute."""
_STATES_OF_BATCH = 4
"""Size of a batch on CUDA, in hidden states of 2 bytes a value: inputs, targets, and the targets in float32."""
_STATES_OF_LOSS = 10
"""Memory of the loss and its backward pass on CUDA, in hidden states of 2 bytes a value: five of float32 (benchmarks/trace_step.py)."""
STREAM_BYTES = 2
"""Size of a value of a stream."""
STREAMS_OF_WINDOW = 5
"""Number of streams of a window at its end: both at its input, both at its output, and the targets."""
_LOGIT_COPIES = 6
"""Number of float32 copies of the logits that are in memory together."""


def rounding_cost(config: QuantizeConfig, sizes: ModelSizes) -> RoundingCost:
    """Cost of learning the rounding of all layers of a block."""
    method, settings = method_of(config.reconstruction), config.reconstruction
    return reduce(
        add, (method.cost(settings, rows, columns) for rows, columns in sizes.layers.values()), RoundingCost()
    )


def transform_cost(config: QuantizeConfig) -> TransformCost:
    """Cost of all transforms that the settings select."""
    costs = [transform.cost() for transform in active(config.transforms, config.scheme)]
    return TransformCost(sum(cost.copies for cost in costs), sum(cost.search_bytes for cost in costs))


def scale_bytes(config: QuantizeConfig, sizes: ModelSizes, each: int) -> int:
    """Memory for all scales of a block with `each` bytes for a scale."""
    size = config.scheme.group_size
    return each * sum(rows * (1 if size is None else columns // size) for rows, columns in sizes.layers.values())


def packed_bytes(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """Size in bytes of the shard of a finished block."""
    codes, chosen = 0, config.schemes
    for name, (rows, columns) in sizes.layers.items():
        path = name.removesuffix(".weight")
        bits = 8 * sizes.stored if config.is_ignored(path) else chosen.of(path).num_bits
        codes += rows * -(-columns * bits // 32) * 4
    zero_points = 0 if config.scheme.symmetric else scale_bytes(config, sizes, 1) * config.scheme.num_bits // 8
    rest = sizes.block_bytes - sizes.weights * sizes.stored
    return codes + scale_bytes(config, sizes, sizes.stored) + zero_points + rest


def stream_bytes(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """Size in bytes of the hidden states of a stream."""
    return config.calibration.num_samples * config.calibration.seq_len * sizes.states * STREAM_BYTES


def state_bytes(config: QuantizeConfig, sizes: ModelSizes, staying: int) -> int:
    """Size in bytes of the window state of `staying` blocks."""
    return staying * (rounding_cost(config, sizes).state_bytes + scale_bytes(config, sizes, 8))


def host_bytes(config: QuantizeConfig, sizes: ModelSizes, memory_mode: MemoryMode, device: str) -> dict[str, int]:
    """Resident memory in addition to that of the computation, in bytes by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        memory_mode: memory mode of the run.
        device: `cpu` or `cuda`.
    """
    host = {"process": PROCESS[device]}
    if not memory_mode.streams_on_disk:
        host["streams"] = STREAMS_OF_WINDOW * stream_bytes(config, sizes)
    if sizes.decoded:
        host["decoding"] = sizes.decoded + _DECODING
    if device == "cuda":  # the packed block and one slab of a layer, or the embeddings while they are read
        packing = packed_bytes(config, sizes.in_windows(config)) + 9 * min(sizes.largest, SLAB_WEIGHTS)
        host["packing"] = max(packing, sizes.stored * sizes.vocabulary * sizes.hidden)
    if config.reconstruction.end_to_end_epochs:
        host["step sizes before an epoch"] = sizes.num_blocks * scale_bytes(config, sizes, 4)
    seq_len = config.calibration.seq_len
    segment = (STREAM_BYTES * sizes.states + sizes.beside) * seq_len + sizes.handed(seq_len)
    read = 2 * (READ_DEPTH + 1) * config.reconstruction.batch_size
    return host | {"read ahead": read * segment, "written behind": (WRITE_DEPTH + 1) * segment}


def device_bytes(
    config: QuantizeConfig,
    sizes: ModelSizes,
    memory_mode: MemoryMode,
    blocks: int,
    device: str,
    beside: Mapping[str, int],
    experts: Mapping[str, int],
) -> dict[str, int]:
    """Peak memory of the computation, in bytes by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        memory_mode: memory mode of the run.
        blocks: number of blocks in a window.
        device: `cpu` or `cuda`.
        beside: further memory while a window is trained, by purpose.
        experts: memory while experts are reconstructed alone, by purpose; their window stays in memory. Empty if no experts are.
    """
    held = sizes.in_windows(config)
    basis, width = _window_bytes(config, held, memory_mode, blocks, device) | dict(beside), WIDTH[device]
    learns, settings = method_of(config.reconstruction).learns, config.reconstruction
    head = _head_bytes(sizes, width)
    found = _activation_bytes(config, held, memory_mode, blocks, device)
    window = basis | max(found, key=lambda parts: sum(parts.values()))
    moments = [basis | parts | (head if settings.head_weight and learns else {}) for parts in found]
    tiles = {"tiles": device_tile_bytes(held.largest)} if device == "cuda" else {}
    if experts:
        moments.append(basis | dict(experts) | tiles)
    moments.append({"embeddings": (width + sizes.stored) * sizes.vocabulary * sizes.hidden})
    if settings.end_to_end_epochs and learns:
        moments.append(_end_to_end_bytes(config, sizes, device) | tiles)
    search = transform_cost(config).search_bytes
    if search and (memory_mode.offload or device == "cuda"):  # the layers of a smoothing pair are in memory together
        before = {} if memory_mode.offload else {"weights": window["weights"]}
        if not memory_mode.offload:  # the last block has none yet
            before["rounding"] = window["rounding"] * (blocks - 1) // blocks
        moments.append(before | {"step sizes": window["step sizes"], "rescaling": search * held.largest})
    if method_of(settings).closed_form:
        moments.append(window | closed_form_bytes(config, held) | tiles)
    return max(moments, key=lambda parts: sum(parts.values()))


def _window_bytes(
    config: QuantizeConfig, sizes: ModelSizes, memory_mode: MemoryMode, blocks: int, device: str
) -> dict[str, int]:
    """Memory of a window without activations, in bytes by purpose."""
    settings = config.reconstruction
    layers = sizes.largest if memory_mode.offload else blocks * sizes.weights
    rest = sizes.block_bytes - sizes.weights * sizes.stored
    cost = rounding_cost(config, sizes)
    offloaded = blocks * cost.offloaded_bytes
    if memory_mode.offload:
        rows, columns = sizes.largest_layer
        offloaded = method_of(settings).cost(settings, rows, columns).offloaded_bytes
    return {
        "weights": blocks * rest + layers * sizes.stored * (1 + transform_cost(config).copies),
        "rounding": blocks * (cost.resident_bytes - cost.offloaded_bytes) + offloaded,
        "step sizes": blocks * scale_bytes(config, sizes, 24),
        "scratch": 2 * WIDTH[device] * min(sizes.largest, SLAB_WEIGHTS),
    }


def _activation_bytes(
    config: QuantizeConfig, sizes: ModelSizes, memory_mode: MemoryMode, blocks: int, device: str
) -> Sequence[dict[str, int]]:
    """Memory of activations, and of tiles and codes beside them, in bytes by purpose, at each moment of a window that may need the most.

    On CUDA these are the loss, while the activations of all blocks are saved; the backward pass of the widest activations, and of the
    weight of the layer that reads them; and the loss of a pass with hard weights.
    """
    settings, seq_len, states = config.reconstruction, config.calibration.seq_len, sizes.states
    batch, saved = settings.batch_size * seq_len, _saved(config, sizes)
    checkpointing = memory_mode.activation_checkpointing or not method_of(settings).learns
    kept = 1 if checkpointing else blocks
    attention = (kept + 1) * 8 * sizes.eager_heads * batch * seq_len  # scores and their softmax for all heads

    def size(values: int) -> int:
        return int(HELD[device] * WIDTH[device] * batch * values) + attention

    if device == "cpu":
        return [{"activations": size((kept + 1) * saved + (8 + blocks) * states)}]
    # norms save float32 inputs; keys and values, which are narrower than queries in many models, are saved once
    narrow = sum(sorted(rows for rows, columns in sizes.layers.values() if columns == sizes.hidden)[:2])
    saved += 2 * sizes.hidden - min(narrow, 2 * sizes.hidden)
    widest = max((rows for rows, _ in sizes.layers.values()), default=0)
    inputs = _STATES_OF_BATCH * states + (blocks - 1) * states * checkpointing
    if checkpointing:
        in_loss, in_backward = 0, saved
    else:
        in_loss = in_backward = blocks * saved - 2 * states  # the first norm has an input without a gradient
    tiles, of_method = device_tile_bytes(sizes.largest), rounding_cost(config, sizes).tile_bytes
    return [
        {"activations": size(inputs + in_loss + _STATES_OF_LOSS * states)},
        {"activations": size(inputs + in_backward + states + 2 * widest)},
        {"activations": size(inputs + in_backward + 2 * states + widest), "tiles": of_method},
        {"activations": size((_STATES_OF_BATCH + _STATES_OF_LOSS) * states), "tiles": tiles, "codes": sizes.largest},
    ]


def _saved(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """Number of values that a block saves for the backward pass for each token."""
    return 2 * sizes.outputs + (4 * sizes.hidden if config.scheme.activation_bits else 0)


def _head_bytes(sizes: ModelSizes, width: int) -> dict[str, int]:
    """Memory of the head and of the logits that are computed together, in bytes by purpose."""
    logits = _LOGIT_COPIES * 4 * HEAD_TOKENS * sizes.vocabulary
    return {"head and logits": width * sizes.vocabulary * sizes.hidden + logits}


def _end_to_end_bytes(config: QuantizeConfig, sizes: ModelSizes, device: str) -> dict[str, int]:
    """Memory of the end-to-end stage, in bytes by purpose."""
    width, settings, seq_len = WIDTH[device], config.reconstruction, config.calibration.seq_len
    together = min(SEGMENTS_PER_STEP, settings.batch_size) * seq_len
    # hidden states between all blocks, and the activations of one block with gradients
    of_block = 2 * _saved(config, sizes) + (9 + sizes.num_blocks) * sizes.states
    attention = 2 * 8 * sizes.eager_heads * together * seq_len
    rest = sizes.block_bytes - sizes.weights * sizes.stored
    logits = _head_bytes(sizes, width)["head and logits"] - width * sizes.vocabulary * sizes.hidden
    return {
        "weights": rest + width * 2 * sizes.weights + 8 * sizes.largest,
        "step sizes": sizes.num_blocks * scale_bytes(config, sizes, 20),  # s0, theta, gradient, two moments
        "activations": int(HELD[device] * width * together * of_block) + attention,
        "embedding, head and logits": width * (sizes.ends_bytes // sizes.stored) + logits,
    }
