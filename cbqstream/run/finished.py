"""Finished blocks, which are read to compute with them, and the newest window state."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import WeightSource, moved
from cbqstream.models.block import build_block
from cbqstream.packed.block_shard import shard_name
from cbqstream.packed.packed_checkpoint import PackedCheckpoint
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.chain import WINDOW_STATE, Chain
from cbqstream.windows.routed_experts import expert_layers


def computing_block(inputs: RunInputs, index: int, source: WeightSource) -> nn.Module:
    """Build a block to compute with, with all tensors in the dtype of the run.

    Args:
        inputs: inputs of the run.
        index: number of the block.
        source: source of its tensors. The weights of experts that are reconstructed alone are not read.
    """
    dtype, device = inputs.compute.dtype, inputs.compute.device
    experts, spec = inputs.experts_alone(index), inputs.meta_model.blocks[index]
    without = () if experts is None else expert_layers(spec, experts)
    return build_block(
        inputs.meta_model, index, source, device=device, dtype=dtype, linear_dtype=dtype, without=without
    )


def finished_source(inputs: RunInputs, index: int, shard: Path) -> WeightSource:
    """Source of the tensors of a finished block.

    Args:
        inputs: inputs of the run.
        index: number of the block.
        shard: its shard.
    """
    packed, tensors = PackedCheckpoint(Checkpoint(read_header(shard)), inputs.config.schemes), inputs.source.infos
    names = inputs.meta_model.blocks[index].tensors.values()
    others = {name: moved(tensors[name], packed.infos) for name in names if name not in packed.infos}
    return packed.viewed({**packed.infos, **others}) if others else packed


def finished_weights(inputs: RunInputs, names: Sequence[str], file: Path) -> WeightSource:
    """Source of weights of finished layers. Those that are not quantized are read from the source of the model.

    Args:
        inputs: inputs of the run.
        names: names of the weights in the checkpoint.
        file: file of the finished layers.
    """
    packed = PackedCheckpoint(Checkpoint(read_header(file)), inputs.config.schemes)
    return packed.viewed({name: packed.infos.get(name, inputs.source.infos[name]) for name in names})


def read_window_state(chain: Chain) -> Checkpoint:
    """The window state that the newest committed window or epoch wrote.

    Raises:
        InputError: the file differs from what was committed.
    """
    file = chain.parts(chain.next_window - 1) / WINDOW_STATE
    chain.require_intact(file)
    return Checkpoint(read_header(file))


class FinishedBlocks:
    """The blocks of the result that are finished.

    Args:
        inputs: inputs of the run.
        chain: the run as far as it is committed.
    """

    def __init__(self, inputs: RunInputs, chain: Chain) -> None:
        self._inputs = inputs
        self._shards = {path.name: path for path in chain.shards()}

    def shard(self, index: int) -> Path | None:
        """The newest shard of a block; None if the block stays in full precision or is not finished."""
        return self._shards.get(shard_name(index))

    def source(self, index: int) -> WeightSource:
        """Source of the tensors of a block: its shard, or the source of the model if it has none."""
        shard = self.shard(index)
        return self._inputs.source if shard is None else finished_source(self._inputs, index, shard)

    def build(self, index: int) -> nn.Module:
        """Build a block with dequantized weights, or with the weights of the source if it has no shard."""
        return computing_block(self._inputs, index, self.source(index))
