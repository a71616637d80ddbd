"""Embedding and head of a model: the parts of its forward pass before the first block and after the last block.

The forward pass of the model in transformers is run with stand-ins in place of the blocks. To compute the embedding, the stand-ins record
the arguments with which the model calls each block. To compute the head, the last stand-in returns finished hidden states. Masks, rotary
embeddings, scalings, the final norm and the head are therefore those of transformers for every family.
"""

import inspect
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.models.block import BlockArguments, HiddenLayout, SegmentValue
from cbqstream.models.differences import name_of, near, not_streamable, same
from cbqstream.models.meta_model import MetaModel, path_of

_LOGIT_TOKENS = 256
"""Number of tokens whose logits are computed together."""
_NO_CACHE = {"use_cache": False, "past_key_values": None, "layer_past": None}
"""Keyword arguments of blocks that turn the cache of keys and values off, under the names that families use."""
_LARGEST_TUPLE = 4
"""Largest number of values that a block returns."""
_TRACED_TOKENS = 8
"""Number of tokens of a segment that are enough to see which values blocks hand on."""
_ON_DEVICE = "_on_device"
"""Name of an empty parameter that is the first of a model, from which its code takes the device."""

Part = Literal["embedding", "head"]
"""Part of a model that is loaded without the other one."""


class _StandIn(nn.Module):
    """Module that replaces a block. It records its arguments, and returns `replacement`, or its input if that is None."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._parameters_of_block = tuple(inspect.signature(block.forward).parameters)
        # models read attributes of blocks, such as the kind of attention, and of their classes
        of_class = {
            name: value
            for each in reversed(type(block).__mro__[: -len(nn.Module.__mro__)])
            for name, value in vars(each).items()
            if isinstance(value, str | int | float | tuple) and not name.startswith("_")
        }
        self._facts = {**of_class, **vars(block)}
        self.seen: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.replacement: Tensor | None = None
        self.returned = 0
        """Length of the tuple that is returned, whose first value are the hidden states; 0 if they are returned alone."""
        self.marks: tuple[Tensor | None, ...] = ()
        """Values that are returned after the hidden states; None by default."""

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("_facts", {})
        found = facts[name] if name in facts else facts.get("_modules", {}).get(name)
        if found is None and name not in facts and name not in self.__dict__.get("_modules", {}):
            raise AttributeError(f'the model uses "{name}" of its blocks')
        return found

    def forward(self, *positional: Any, **named: Any) -> Tensor | tuple[Tensor | None, ...]:
        arguments = {**dict(zip(self._parameters_of_block, positional, strict=False)), **named}
        self.seen = arguments.pop(self._parameters_of_block[0])
        self.arguments = arguments
        output: Tensor = self.seen if self.replacement is None else self.replacement
        return (output, *(self.marks or [None] * (self.returned - 1))) if self.returned else output


def _is_shared(value: Any, objects: Sequence[Any]) -> bool:
    """Whether an argument is an empty dict that several blocks get."""
    return isinstance(value, MutableMapping) and not value and sum(other is value for other in objects) > 1


def _without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a block with its cache turned off."""
    return {**arguments, **{name: value for name, value in _NO_CACHE.items() if name in arguments}}


@dataclass(frozen=True, slots=True)
class BlockCall:
    """A call of a block by the model."""

    index: int
    """Number of the block."""
    hidden_states: Tensor
    """The first argument."""
    arguments: Mapping[str, Any]
    """The other arguments, without those that are `handed`."""
    handed: Mapping[str, int]
    """Place of an argument among the values that the block before returned, by name."""
    output: Tensor
    """The hidden states that were returned."""


class EmbeddingAndHead:
    """Embedding and head of a model in memory, made by `load_embedding_and_head`.

    Args:
        meta_model: the model, whose weights outside the blocks are in memory.
        stand_ins: modules that replace the blocks in the model.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        InputError: the hidden states of the model have a shape that is not known.
    """

    def __init__(
        self, meta_model: MetaModel, stand_ins: list[_StandIn], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._meta_model = meta_model
        self._model = meta_model.text_model
        self._by_segment = (*meta_model.family.arguments_by_segment, *meta_model.handover.repeated)
        self._stand_ins = stand_ins
        self._device = device
        self._dtype = dtype
        self._counts_positions = meta_model.handover.counts_positions
        self.layout = HiddenLayout()
        """Shape in which the model hands on hidden states."""
        self._learn_what_blocks_return()

    @torch.no_grad()
    def embed(self, ids_S: Tensor) -> Tensor:
        """Input of the first block, [S, D], for one segment of token ids, int64 [S]."""
        positions = {} if self._counts_positions else {"position_ids": self._positions(len(ids_S))}
        self._model.base_model(input_ids=ids_S.unsqueeze(0).to(self._device), use_cache=False, **positions)
        seen = self._stand_ins[0].seen
        if seen is None:
            raise RuntimeError("the model did not call its first block")
        return self.layout.flat(seen)[0]

    def learn_who_counts_positions(self) -> bool:
        """Find out whether the model has to count the positions itself. On CUDA, counting may not be deterministic."""
        rows = self._model.get_input_embeddings().weight.shape[0]
        ids_S = torch.arange(rows // 2, rows // 2 + 2)
        given_SD = self.embed(ids_S)
        self._counts_positions = True
        self._counts_positions = not near(given_SD, self.embed(ids_S))
        return self._counts_positions

    def enter(self, ids_S: Tensor, arguments: Sequence[BlockArguments]) -> tuple[Tensor, dict[str, Tensor]]:
        """Input of the first block, [S, D], and the arguments of all blocks that depend on the tokens, by their key.

        Args:
            ids_S: token ids of one segment, int64 [S].
            arguments: the result of `block_arguments` for a segment of the same length.
        """
        x_SD = self.embed(ids_S)
        found = {
            each.key: stand_in.arguments[name].detach()[0]
            for stand_in, called in zip(self._stand_ins, arguments, strict=True)
            for name, each in called.of_tokens.items()
        }
        return x_SD, found

    def block_arguments(self, ids_S: Tensor) -> list[BlockArguments]:
        """Keyword arguments of each block, for batches of segments with the length of `ids_S`, int64 [S].

        An argument depends on the tokens if it is another one for other tokens.

        Raises:
            InputError: an argument that depends on the tokens is not a tensor whose first dimension is the number of segments.
        """
        rows = self._model.get_input_embeddings().weight.shape[0]
        self.embed((ids_S + 1) % rows)
        others = [_without_cache(stand_in.arguments) for stand_in in self._stand_ins]
        self.embed(ids_S)
        keys: dict[object, str] = {}
        found = [
            self._arguments_of(index, _without_cache(stand_in.arguments), other, keys)
            for index, (stand_in, other) in enumerate(zip(self._stand_ins, others, strict=True))
        ]
        return self._with_state(found, ids_S)

    def _with_state(self, found: list[BlockArguments], ids_S: Tensor) -> list[BlockArguments]:
        """Arguments of all blocks, with the names of those that blocks hand on."""
        calls = self.trace(ids_S[:_TRACED_TOKENS], 0)
        kept = self._meta_model.handover.kept
        handed = [*(call.handed for call in calls), {}]
        objects = [value for called in found for value in called.values.values()]
        return [
            replace(
                called,
                takes=tuple(handed[index]),
                gives={place: name for name, place in handed[index + 1].items()},
                kept=kept[index] if kept else None,
                shared=tuple(name for name, value in called.values.items() if _is_shared(value, objects)),
            )
            for index, called in enumerate(found)
        ]

    def _arguments_of(
        self, index: int, called: Mapping[str, Any], other: Mapping[str, Any], keys: dict[object, str]
    ) -> BlockArguments:
        """Keyword arguments of a block.

        Args:
            index: number of the block.
            called: its arguments for a segment.
            other: its arguments for another segment.
            keys: key of each tensor that was found to depend on the tokens; new ones are added. Blocks that get one tensor share it.
        """
        of_tokens = {}
        for name, value in called.items():
            if same(value, other.get(name)):
                continue
            if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != 1:
                block = name_of(self._meta_model, index)
                what = f'{block} receives an argument "{name}" that depends on the tokens and is not a tensor of one segment'
                raise not_streamable(self._meta_model, what)
            place = value.data_ptr(), value.shape, value.stride(), value.dtype
            key = keys.setdefault(place, f"{index}.{name}")
            of_tokens[name] = SegmentValue(key, tuple(value.shape[1:]), value.dtype)
        values = {name: value for name, value in called.items() if name not in of_tokens}
        return BlockArguments(values, self._by_segment, of_tokens, self.layout)

    def trace(self, ids_S: Tensor, seed: int) -> list[BlockCall]:
        """Calls of the blocks in order, for one segment of token ids, int64 [S]. Blocks return random hidden states, made from `seed`."""
        x_SD, calls = self.embed(ids_S), list[BlockCall]()

        def record(index: int, stand_in: _StandIn) -> None:
            if stand_in.seen is not None and stand_in.replacement is not None:
                called = _without_cache(stand_in.arguments)
                marks = self._stand_ins[index - 1].marks if index else ()
                handed = {
                    name: 1 + next(place for place, mark in enumerate(marks) if value is mark)
                    for name, value in called.items()
                    if any(value is mark for mark in marks)
                }
                others = {name: value for name, value in called.items() if name not in handed}
                calls.append(BlockCall(index, stand_in.seen, others, handed, stand_in.replacement))

        generator = torch.Generator().manual_seed(seed)
        with ExitStack() as hooks:
            for index, stand_in in enumerate(self._stand_ins):
                output_1SD = torch.randn(1, *x_SD.shape, generator=generator).to(self._device, self._dtype)
                stand_in.replacement = self.layout.shaped(output_1SD)
                marks = [torch.randn(1, generator=generator) for _ in range(stand_in.returned - 1)]
                stand_in.marks = tuple(mark.to(self._device) for mark in marks)
                hook = stand_in.register_forward_hook(lambda module, *_, index=index: record(index, module))
                hooks.callback(hook.remove)
            self.embed(ids_S)
        for stand_in in self._stand_ins:
            stand_in.replacement, stand_in.marks = None, ()
        return calls

    @torch.no_grad()
    def logits(self, x_SD: Tensor) -> Iterator[Tensor]:
        """Logits of hidden states [S, D] after the last block, in pieces float32 [at most 256, vocabulary] in the order of the tokens."""
        for x_TD in torch.split(x_SD, _LOGIT_TOKENS):
            yield self.head(x_TD.to(self._device))

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits, float32 [T, vocabulary], of hidden states [T, D] after the last block; differentiable in them."""
        self._stand_ins[-1].replacement = self.layout.shaped(x_TD.unsqueeze(0))
        output = self._model(**self._any_tokens(len(x_TD)))
        self._stand_ins[-1].replacement = None
        logits: Tensor = output.logits[0].float()
        return logits

    def head_reads_only_the_last_block(self, x_TD: Tensor) -> bool:
        """Whether the logits of hidden states [T, D] stay the same if the embedding and the other blocks return something else."""
        expected, generator = self.head(x_TD), torch.Generator().manual_seed(0)

        def noise(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

        with ExitStack() as stack:
            tokens = self._model.get_input_embeddings()
            stack.callback(tokens.register_forward_hook(lambda module, inputs, output: noise(output)).remove)
            for stand_in in self._stand_ins[:-1]:
                stand_in.replacement = noise(self.layout.shaped(x_TD.unsqueeze(0)))
                stack.callback(setattr, stand_in, "replacement", None)
            return near(self.head(x_TD), expected)

    def _learn_what_blocks_return(self) -> None:
        """Find the shape of hidden states, and whether the model expects them alone from its blocks or as the first of several values.

        Stand-ins return them alone first. A model that takes the first value of a tuple then takes the first segment of the tensor.

        Raises:
            InputError: the hidden states have a shape that is not known.
        """
        failed: Exception | None = None
        for returned in range(_LARGEST_TUPLE + 1):
            for stand_in in self._stand_ins:
                stand_in.returned, stand_in.seen = returned, None
            try:
                self._model.base_model(**self._any_tokens(2))
            except Exception as error:  # noqa: BLE001  # the code of the model does not expect so many values
                failed = failed or error
                continue
            first, second = (stand_in.seen for stand_in in (self._stand_ins[0], self._stand_ins[:2][-1]))
            if first is not None and second is not None and first.shape == second.shape:
                layout = HiddenLayout.of(first.shape, 2)
                if layout is None:
                    shape = list(first.shape)
                    raise not_streamable(
                        self._meta_model, f"the first block receives hidden states of shape {shape} for 2 tokens"
                    )
                self.layout = layout
                return
        raise failed or not_streamable(self._meta_model, "the second block does not receive the output of the first")

    def _any_tokens(self, length: int) -> dict[str, Any]:
        """Arguments of the model for a segment whose content does not matter."""
        ids_1S = torch.zeros(1, length, dtype=torch.long, device=self._device)
        return {"input_ids": ids_1S, "position_ids": self._positions(length), "use_cache": False}

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
    output = f"{path_of(model, meta_model.text_model.get_output_embeddings())}.weight"
    embeddings = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    try:
        for name, stored in meta_model.outer.items():
            if only == "embedding" and name == output:
                continue  # a tied matrix is read under the name of the other part
            if only == "head" and name in embeddings - {output}:
                value = torch.zeros((), device=device, dtype=dtype).expand(empty[name].shape)  # takes no memory
            else:
                if stored not in read:
                    read[stored] = source.read(stored, device=device, dtype=dtype)
                value = read[stored]
            _set_parameter(model, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))
        for index, stand_in in enumerate(stand_ins):
            layers[index] = stand_in
        with _on_device(model, device, dtype):
            yield EmbeddingAndHead(meta_model, stand_ins, device, dtype)
    finally:
        for index in range(len(stand_ins)):
            layers[index] = nn.Identity()
        for name, parameter in empty.items():
            _set_parameter(model, name, parameter)


@contextmanager
def _on_device(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let the code of a model find `device` as its own inside a `with`, although its first parameter may not be in memory."""
    parts = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and next((value.is_meta for value in module.parameters()), False)
    ]
    for module in parts:
        mark = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)
        module._parameters = {_ON_DEVICE: mark, **module._parameters}
    try:
        yield
    finally:
        for module in parts:
            del module._parameters[_ON_DEVICE]


def _set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)
