"""The shard of a finished block: its quantized linear layers, and the other tensors of the block."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import StoredTensors, copied
from cbqstream.disk import Disk, FileDigest, ScratchFile
from cbqstream.packed.layout import SCALE
from cbqstream.packed.layouts import encode
from cbqstream.packed.shard import FileTensor, LazyTensor, write_tensors
from cbqstream.records import BlockSpec, QuantizedWeight
from cbqstream.runtime.offload import OffloadedTensor

NONE: Mapping[str, Checkpoint] = MappingProxyType({})
"""No finished layers."""
HEAD = "head.safetensors"
"""File name of the shard of a quantized head."""


def shard_name(index: int) -> str:
    """File name of the shard of block `index`."""
    return f"block-{index:05d}.safetensors"


def write_block(
    disk: Disk,
    folder: Path,
    spec: BlockSpec,
    weights: Iterable[tuple[str, QuantizedWeight]],
    stored: Callable[[str, Tensor], Tensor],
    source: StoredTensors,
    file: ScratchFile | None,
    finished: Mapping[str, Checkpoint] = NONE,
) -> tuple[str, FileDigest]:
    """Write the shard of a block into `folder`.

    Args:
        disk: used for the durable write.
        folder: an existing folder.
        spec: names of the tensors of the block.
        weights: name in the block and quantized weight of each quantized layer, generated one at a time.
        stored: function that gives the stored value of a tensor outside the quantized layers from its name in the block and its value
            in the source.
        source: the source checkpoint.
        file: file to which encoded weights are offloaded until all layers are encoded; None keeps them in memory.
        finished: files that hold layers which are encoded already, by the name of the layer in the block.

    Returns:
        File name and digest of the shard.
    """
    tensors: dict[str, LazyTensor] = {}
    left = dict(spec.tensors)
    for layer, held in finished.items():
        path = left.pop(f"{layer}.weight").removesuffix(".weight")
        tensors |= {name: FileTensor(held, name) for name in held.infos if name.rpartition(".")[0] == path}
    for layer, weight in weights:
        name = left.pop(f"{layer}.weight")
        for part, value in encode(weight, scale_dtype=source.infos[name].dtype).items():
            tensors[f"{name.removesuffix('.weight')}.{part}"] = (
                value if file is None else OffloadedTensor.of(value, file)
            )
    quantized = copied({name: source.infos[name] for local, name in spec.tensors.items() if local not in left})
    for local, name in left.items():
        value = source.read(name, device=torch.device("cpu"))
        new = stored(local, value)
        as_stored = copied({name: source.infos[name]})
        # tensors in another layout are copied as the checkpoint has them, unless they changed or are quantized in part
        if new is value and name not in as_stored and quantized.keys().isdisjoint(as_stored):
            tensors |= {part: source.value(tensor) for part, tensor in as_stored.items()}
        else:
            tensors[name] = new
    return shard_name(spec.index), write_tensors(disk, folder / shard_name(spec.index), tensors)


def write_head(
    disk: Disk, folder: Path, name: str, weight: QuantizedWeight, scale_dtype: torch.dtype
) -> tuple[Path, FileDigest]:
    """Write the shard of a quantized head into `folder`.

    Args:
        disk: used for the durable write.
        folder: an existing folder.
        name: name of the head's weight in the source.
        weight: the quantized weight.
        scale_dtype: dtype in which the scales are stored.

    Returns:
        Path and digest of the shard.
    """
    tensors = encode(weight, scale_dtype=scale_dtype)
    path = folder / HEAD
    named = {f"{name.removesuffix('.weight')}.{part}": value for part, value in tensors.items()}
    return path, write_tensors(disk, path, named)


def read_scales(shard: Path, *, device: torch.device) -> dict[str, Tensor]:
    """Scales of the quantized layers in a shard, float32 [O, G], by the path of the layer in the checkpoint."""
    source = Checkpoint(read_header(shard))
    names = [name for name in source.infos if name.endswith(f".{SCALE}")]
    return {name.removesuffix(f".{SCALE}"): source.read(name, device=device, dtype=torch.float32) for name in names}


def rewrite_scales(disk: Disk, folder: Path, shard: Path, scales: Mapping[str, Tensor]) -> FileDigest:
    """Write a copy of a shard with other scales into `folder`, under the same file name.

    Args:
        disk: used for the durable write.
        folder: an existing folder.
        shard: the shard to copy.
        scales: new scales [O, G] by the path of the layer in the checkpoint; they are stored in the dtype of the old ones.

    Returns:
        Digest of the new file.
    """
    source = Checkpoint(read_header(shard))
    tensors = {name: source.read(name, device=torch.device("cpu")) for name in source.infos}
    for layer, scale_OG in scales.items():
        tensors[f"{layer}.{SCALE}"] = scale_OG.to("cpu", tensors[f"{layer}.{SCALE}"].dtype)
    return write_tensors(disk, folder / shard.name, tensors)
