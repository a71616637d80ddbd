"""The shard of a finished block: packed linear layers, and everything else of the block as it was."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import Disk, FileDigest, ScratchFile
from cbqstream.packed.format import SCALE, encode_in_slabs
from cbqstream.packed.shard import write_tensors
from cbqstream.records import BlockSpec, QuantizedWeight
from cbqstream.runtime.offload import OffloadedTensor

HEAD = "head.safetensors"


def shard_name(index: int) -> str:
    """File name of the shard of block `index`."""
    return f"block-{index:05d}.safetensors"


def write_block(
    disk: Disk,
    folder: Path,
    spec: BlockSpec,
    weights: Iterable[tuple[str, QuantizedWeight]],
    rescaled: Mapping[str, Tensor],
    source: Checkpoint,
    file: ScratchFile | None,
) -> tuple[str, FileDigest]:
    """Write the shard of a block into `folder`.

    Args:
        disk: for durable writes.
        folder: must exist.
        spec: the block.
        weights: names of layers within the block, and their quantized weights; one at a time is enough.
        rescaled: what other tensors of the block are divided by, powers of two, by their name within it; stored in the dtype they had.
        source: the original checkpoint; the rest of the block is copied from it unchanged.
        file: where packed weights wait until all are; None is memory.

    Returns:
        The file's name and digest.
    """
    tensors: dict[str, Tensor | OffloadedTensor] = {}
    left = dict(spec.tensors)
    for layer, weight in weights:
        name = left.pop(f"{layer}.weight")
        for part, value in encode_in_slabs(weight, scale_dtype=source.infos[name].dtype).items():
            tensors[f"{name.removesuffix('.weight')}.{part}"] = (
                value if file is None else OffloadedTensor.of(value, file)
            )
    for local, name in left.items():
        value = source.read(name, device=torch.device("cpu"))
        tensors[name] = (value.float() / rescaled[local].cpu()).to(value.dtype) if local in rescaled else value
    return shard_name(spec.index), write_tensors(disk, folder / shard_name(spec.index), tensors)


def write_head(
    disk: Disk, folder: Path, name: str, weight: QuantizedWeight, scale_dtype: torch.dtype
) -> tuple[Path, FileDigest]:
    """Write the shard of the head, whose weight the source calls `name`."""
    tensors = encode_in_slabs(weight, scale_dtype=scale_dtype)
    path = folder / HEAD
    named = {f"{name.removesuffix('.weight')}.{part}": value for part, value in tensors.items()}
    return path, write_tensors(disk, path, named)


def read_scales(shard: Path, *, device: torch.device) -> dict[str, Tensor]:
    """The step sizes in a shard that `write_block` made, float32 [O, G], by the module path of their layer."""
    source = Checkpoint(read_header(shard))
    names = [name for name in source.infos if name.endswith(f".{SCALE}")]
    return {name.removesuffix(f".{SCALE}"): source.read(name, device=device, dtype=torch.float32) for name in names}


def rewrite_scales(disk: Disk, folder: Path, shard: Path, scales: Mapping[str, Tensor]) -> FileDigest:
    """Write `shard` again into `folder`, under its own name, with other step sizes, by the module path of their layer."""
    source = Checkpoint(read_header(shard))
    tensors = {name: source.read(name, device=torch.device("cpu")) for name in source.infos}
    for layer, scale_OG in scales.items():
        tensors[f"{layer}.{SCALE}"] = scale_OG.to("cpu", tensors[f"{layer}.{SCALE}"].dtype)
    return write_tensors(disk, folder / shard.name, tensors)
