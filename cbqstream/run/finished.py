"""What is done, read back: blocks that only compute, and what the newest window carried over."""

from pathlib import Path

from torch import nn

from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.models.block import build_block
from cbqstream.packed.block_shard import shard_name
from cbqstream.packed.packed_checkpoint import PackedSource
from cbqstream.records import WeightSource
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.chain import CARRY, Chain


def computing_block(inputs: RunInputs, index: int, source: WeightSource) -> nn.Module:
    """Block `index` from `source`, all of it in the dtype of the run."""
    dtype = inputs.compute.dtype
    return build_block(inputs.meta_model, index, source, device=inputs.compute.device, dtype=dtype, linear_dtype=dtype)


def read_carry(chain: Chain) -> Checkpoint:
    """What the newest window, or epoch, carried over.

    Raises:
        InputError: it is not what was committed.
    """
    file = chain.parts(chain.next_window - 1) / CARRY
    chain.require_intact(file)
    return Checkpoint(read_header(file))


class FinishedBlocks:
    """The blocks as the result has them, as far as windows have left them."""

    def __init__(self, inputs: RunInputs, chain: Chain) -> None:
        self._inputs = inputs
        self._shards = {path.name: path for path in chain.shards()}

    def shard(self, index: int) -> Path | None:
        """The newest shard of a block; None if it stays in full precision, or is not done."""
        return self._shards.get(shard_name(index))

    def build(self, index: int) -> nn.Module:
        """A block with its weights dequantized, or as they were where it has no shard."""
        inputs, shard = self._inputs, self.shard(index)
        if shard is None:
            return computing_block(inputs, index, inputs.source)
        return computing_block(inputs, index, PackedSource(Checkpoint(read_header(shard)), inputs.config.schemes))
