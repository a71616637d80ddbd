"""Blocks that only compute: of the original model, and those that are done, read back from their shards."""

from pathlib import Path

from torch import nn

from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.models.block import build_block
from cbqstream.packed.block_shard import shard_name
from cbqstream.packed.source import PackedSource
from cbqstream.records import WeightSource
from cbqstream.run.inputs import RunInputs
from cbqstream.run.journal import Journal


def computing_block(inputs: RunInputs, index: int, source: WeightSource) -> nn.Module:
    """Block `index` from `source`, all of it in the dtype of the run."""
    dtype = inputs.compute.dtype
    return build_block(inputs.skeleton, index, source, device=inputs.compute.device, dtype=dtype, linear_dtype=dtype)


class FinishedBlocks:
    """The blocks as the result has them, as far as windows have left them."""

    def __init__(self, inputs: RunInputs, journal: Journal) -> None:
        self._inputs = inputs
        self._shards = {path.name: path for path in journal.chain.shards()}

    def shard(self, index: int) -> Path | None:
        """The newest shard of a block; None if it stays in full precision, or is not done."""
        return self._shards.get(shard_name(index))

    def build(self, index: int) -> nn.Module:
        """A block with its weights dequantized, or as they were where it has no shard."""
        inputs, shard = self._inputs, self.shard(index)
        if shard is None:
            return computing_block(inputs, index, inputs.source)
        return computing_block(inputs, index, PackedSource(Checkpoint(read_header(shard)), inputs.config.scheme))
