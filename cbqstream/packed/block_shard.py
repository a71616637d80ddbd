"""The shard of a finished block: packed linear layers, and everything else of the block as it was."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import Disk, FileDigest
from cbqstream.packed.format import encode
from cbqstream.packed.shard import write_tensors
from cbqstream.records import BlockSpec, QuantizedWeight


def shard_name(index: int) -> str:
    """File name of the shard of block `index`."""
    return f"block-{index:05d}.safetensors"


def write_block(
    disk: Disk,
    folder: Path,
    spec: BlockSpec,
    weights: Mapping[str, QuantizedWeight],
    rescaled: Mapping[str, Tensor],
    source: Checkpoint,
) -> tuple[str, FileDigest]:
    """Write the shard of a block into `folder`.

    Args:
        disk: for durable writes.
        folder: must exist.
        spec: the block.
        weights: quantized weights by the name of the layer within the block.
        rescaled: other tensors of the block that changed, by their name within it; stored in the dtype they had.
        source: the original checkpoint; the rest of the block is copied from it unchanged.

    Returns:
        The file's name and digest.
    """
    tensors: dict[str, Tensor] = {}
    for local, name in spec.tensors.items():
        layer = local.removesuffix(".weight")
        if local == f"{layer}.weight" and layer in weights:
            encoded = encode(weights[layer], scale_dtype=source.infos[name].dtype)
            tensors.update({f"{name.removesuffix('.weight')}.{part}": value for part, value in encoded.items()})
        elif local in rescaled:
            tensors[name] = rescaled[local].to(source.infos[name].dtype)
        else:
            tensors[name] = source.read(name, device=torch.device("cpu"))
    return shard_name(spec.index), write_tensors(disk, folder / shard_name(spec.index), tensors)
