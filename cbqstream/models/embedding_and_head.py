"""Embedding and head of a model: the parts of its forward pass before the first block and after the last block.

The forward pass of the model in transformers is run with stand-ins in place of the blocks. To compute the embedding, the stand-ins record
the arguments with which the model calls each block. To compute the head, the last stand-in returns finished hidden states. Masks, rotary
embeddings, scalings, the final norm and the head are therefore those of transformers for every family.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.models.block import BlockArguments
from cbqstream.models.meta_model import MetaModel, path_of

_LOGIT_TOKENS = 256
"""Number of tokens whose logits are computed together."""
_NO_CACHE = {"use_cache": False, "past_key_values": None, "layer_past": None}
"""Keyword arguments of blocks that turn the cache of keys and values off, under the names that families use."""

Part = Literal["embedding", "head"]
"""Part of a model that is loaded without the other one."""


class _StandIn(nn.Module):
    """Module that replaces a block. It records its arguments, and returns `replacement`, or its input if that is None."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._parameters_of_block = tuple(inspect.signature(block.forward).parameters)
        self._facts = vars(block)  # models read attributes of blocks, such as the kind of attention
        self.seen: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.replacement: Tensor | None = None
        self.gives_tuple = False

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("_facts", {})
        return facts[name] if name in facts else facts.get("_modules", {}).get(name) or super().__getattr__(name)

    def forward(self, *positional: Any, **named: Any) -> Tensor | tuple[Tensor]:
        arguments = {**dict(zip(self._parameters_of_block, positional, strict=False)), **named}
        self.seen = arguments.pop(self._parameters_of_block[0])
        self.arguments = arguments
        output: Tensor = self.seen if self.replacement is None else self.replacement
        return (output,) if self.gives_tuple else output


@dataclass(frozen=True, slots=True)
class BlockCall:
    """A call of a block by the model."""

    index: int
    """Number of the block."""
    hidden_states: Tensor
    """The first argument."""
    arguments: BlockArguments
    """The other arguments."""
    output: Tensor
    """The hidden states that were returned."""


class EmbeddingAndHead:
    """Embedding and head of a model in memory, made by `load_embedding_and_head`.

    Args:
        meta_model: the model, whose weights outside the blocks are in memory.
        stand_ins: modules that replace the blocks in the model.
        device: device of the weights.
        dtype: dtype of the weights.
    """

    def __init__(
        self, meta_model: MetaModel, stand_ins: list[_StandIn], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._model = meta_model.text_model
        self._by_segment = meta_model.family.arguments_by_segment
        self._stand_ins = stand_ins
        self._device = device
        self._dtype = dtype
        self._learn_what_blocks_return()

    @torch.no_grad()
    def embed(self, ids_S: Tensor, *, own_positions: bool = False) -> Tensor:
        """Input of the first block, [S, D], for one segment of token ids, int64 [S].

        Args:
            ids_S: the token ids.
            own_positions: let the model count the positions.
        """
        ids_1S = ids_S.unsqueeze(0).to(self._device)
        positions = {} if own_positions else {"position_ids": self._positions(len(ids_S))}
        self._model.base_model(input_ids=ids_1S, use_cache=False, **positions)
        seen = self._stand_ins[0].seen
        if seen is None:
            raise RuntimeError("the model did not call its first block")
        return seen[0]

    def block_arguments(self, ids_S: Tensor) -> list[BlockArguments]:
        """Keyword arguments of each block, for batches of segments with the length of `ids_S`, int64 [S]."""
        self.embed(ids_S)
        return [self._arguments_of(stand_in) for stand_in in self._stand_ins]

    def trace(self, ids_S: Tensor) -> list[BlockCall]:
        """Calls of the blocks in order, for one segment of token ids, int64 [S]. Each block returns random hidden states."""
        shape, calls = self.embed(ids_S).shape, list[BlockCall]()

        def record(index: int, stand_in: _StandIn) -> None:
            if stand_in.seen is not None and stand_in.replacement is not None:
                arguments = self._arguments_of(stand_in)
                calls.append(BlockCall(index, stand_in.seen, arguments, stand_in.replacement))

        generator = torch.Generator().manual_seed(int(ids_S.sum()))
        with ExitStack() as hooks:
            for index, stand_in in enumerate(self._stand_ins):
                stand_in.replacement = torch.randn(1, *shape, generator=generator).to(self._device, self._dtype)
                hook = stand_in.register_forward_hook(lambda module, *_, index=index: record(index, module))
                hooks.callback(hook.remove)
            self.embed(ids_S)
        for stand_in in self._stand_ins:
            stand_in.replacement = None
        return calls

    def _arguments_of(self, stand_in: _StandIn) -> BlockArguments:
        """Keyword arguments of the last call of a block, with its cache turned off."""
        off = {key: value for key, value in _NO_CACHE.items() if key in stand_in.arguments}
        return BlockArguments({**stand_in.arguments, **off}, self._by_segment)

    @torch.no_grad()
    def logits(self, x_SD: Tensor) -> Iterator[Tensor]:
        """Logits of hidden states [S, D] after the last block, in pieces float32 [at most 256, vocabulary] in the order of the tokens."""
        for x_TD in torch.split(x_SD, _LOGIT_TOKENS):
            yield self.head(x_TD.to(self._device))

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits, float32 [T, vocabulary], of hidden states [T, D] after the last block; differentiable in them."""
        self._stand_ins[-1].replacement = x_TD.unsqueeze(0)
        output = self._model(**self._dummy(len(x_TD), x_TD.dtype))
        self._stand_ins[-1].replacement = None
        logits: Tensor = output.logits[0].float()
        return logits

    def _learn_what_blocks_return(self) -> None:
        """Find out whether the model expects hidden states [B, S, D] from its blocks, or a tuple whose first value they are.

        Stand-ins return a tensor [1, 2, D] first. A model that takes the first value of a tuple then takes the first segment of the tensor.
        """
        width = self._model.config.get_text_config().hidden_size
        for stand_in in self._stand_ins:
            stand_in.replacement = torch.zeros(1, 2, width, device=self._device, dtype=self._dtype)
        self._model.base_model(**self._dummy(2, self._dtype))
        second = self._stand_ins[1].seen if len(self._stand_ins) > 1 else None
        gives_tuple = second is not None and second.dim() == 2  # only the first segment of the tensor
        for stand_in in self._stand_ins:
            stand_in.gives_tuple, stand_in.replacement = gives_tuple, None

    def _dummy(self, length: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the model for a segment whose content does not matter."""
        width = self._model.get_input_embeddings().embedding_dim
        zeros = torch.zeros(1, length, width, device=self._device, dtype=dtype)
        return {"inputs_embeds": zeros, "position_ids": self._positions(length), "use_cache": False}

    def _positions(self, length: int) -> Tensor:
        """Positions 0 to length - 1, [1, S]. Without them, OPT computes positions with a cumsum that is not deterministic on CUDA."""
        return torch.arange(length, device=self._device).unsqueeze(0)


@contextmanager
def load_embedding_and_head(
    meta_model: MetaModel, source: WeightSource, *, device: torch.device, dtype: torch.dtype, only: Part | None = None
) -> Iterator[EmbeddingAndHead]:
    """Load embedding, final norm and head into memory inside a `with`.

    Args:
        meta_model: the model.
        source: source of the tensors.
        device: device of the tensors.
        dtype: dtype of the tensors.
        only: part that is needed. The large matrix of the other part is then not loaded, unless the two matrices are tied.

    Raises:
        InputError: a tensor cannot be read.
    """
    model = meta_model.hf_model
    layers = model.get_submodule(meta_model.blocks_path)
    stand_ins = [_StandIn(block) for block in meta_model.templates]
    empty = dict(model.named_parameters(remove_duplicate=False))
    read: dict[str, Tensor] = {}
    text = meta_model.text_model
    unused = {"embedding": text.get_output_embeddings(), "head": text.get_input_embeddings()}.get(only or "")
    try:
        for name, stored in meta_model.outer.items():
            if unused is not None and name == f"{path_of(model, unused)}.weight":
                continue  # a tied matrix is read under the name of the other part
            if stored not in read:
                read[stored] = source.read(stored, device=device, dtype=dtype)
            _set_parameter(model, name, nn.Parameter(read[stored], requires_grad=False))
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))
        for index, stand_in in enumerate(stand_ins):
            layers[index] = stand_in
        yield EmbeddingAndHead(meta_model, stand_ins, device, dtype)
    finally:
        for index in range(len(stand_ins)):
            layers[index] = nn.Identity()
        for name, parameter in empty.items():
            _set_parameter(model, name, parameter)


def _set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)
