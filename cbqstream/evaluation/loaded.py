"""Comparison of a model that transformers loads as a whole with the evaluation block by block."""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from logging import CRITICAL
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CompressedTensorsConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import logging

from cbqstream.checkpoint.folder import read_json
from cbqstream.errors import DeviceMemoryError, InputError, shown, some_shown
from cbqstream.evaluation.loading_rules import given_rules, lacks_rules
from cbqstream.evaluation.model import EvaluatedModel, EvaluationOptions
from cbqstream.models.experts import Experts
from cbqstream.models.families import EXPERT
from cbqstream.models.meta_model import path_of
from cbqstream.packed.packed_checkpoint import PackedCheckpoint
from cbqstream.runtime.device import fixed_numerics
from cbqstream.runtime.memory import is_out_of_memory, release_free_memory

_SEGMENTS, _TOKENS = 2, 16
_NEAR, _FAR = 0.02, 0.2
"""Allowed differences of a logit, as shares of the largest logit.

The first is for differences of float32 arithmetic. The second is for inputs that are rounded to a neighboring code.
"""
_NAMED = 3
"""Number of tensors that a message names."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Result of loading a model with transformers and comparing its logits with those of the streamed evaluation."""

    class_name: str
    """Class of transformers that config.json names, or that belongs to the configuration."""
    dequantized: bool
    """Whether the model was loaded with `dequantize=True`, that is with dense weights and without quantized inputs."""
    unused: tuple[str, ...]
    """Names of tensors of the checkpoint that the class does not have."""
    difference: float
    """Largest difference of a logit, as a share of the largest logit."""
    same: int
    """Number of tokens after which both evaluations have the same most likely next token."""
    tokens: int
    """Number of all tokens."""
    lacked_rules: bool = False
    """Whether transformers lacks rules to read the model, which were given to it."""

    def __str__(self) -> str:
        way = " with dequantize=True" if self.dequantized else ""
        near = f"logits within {self.difference:.1e} of the streamed ones, same next token after {self.same} of {self.tokens}"
        unused = f"; {self.class_name} does not use {some_shown(self.unused, _NAMED)}" if self.unused else ""
        rules = "; transformers itself lacks rules for it" if self.lacked_rules else ""
        return f"transformers {version('transformers')} loads it as {self.class_name}{way}: {near}{unused}{rules}"


@torch.no_grad()
def load_beside_streamed(folder: Path, **options: Unpack[EvaluationOptions]) -> Loaded:
    """Load a model with transformers and compare its logits on two segments with those of the streamed evaluation.

    The class that config.json names is loaded; if it has no logits of tokens, the causal language model of the configuration is loaded
    too. If transformers cannot load the model without options, it is loaded with `dequantize=True`. The whole model is in memory.

    Args:
        folder: folder of a model, quantized by this project or not.
        options: see `EvaluationOptions`.

    Raises:
        InputError: transformers cannot load the model either way, does not find a weight, or has other weights or logits.
        DeviceMemoryError: the model does not fit in memory.
    """
    streamed = EvaluatedModel.open(folder, **options)
    packed, model_type = (
        isinstance(streamed.source, PackedCheckpoint),
        read_json(folder, "config.json").get("model_type"),
    )
    alias = str(model_type) if model_type != streamed.meta_model.config.model_type else None
    name = (_named_class(folder) or type(streamed.meta_model.hf_model)).__name__
    lacks = alias is not None or (packed and lacks_rules(streamed.meta_model)) or _has_dense_experts(streamed)
    with (
        given_rules(streamed.meta_model, name, alias=alias, packed=packed),
        fixed_numerics(streamed.compute.device, streamed.threads),
    ):
        return replace(_compare(folder, streamed), lacked_rules=lacks)


def _has_dense_experts(streamed: EvaluatedModel) -> bool:
    """Whether experts of a quantized model are in full precision, which transformers does not find by itself."""
    if not isinstance(streamed.source, PackedCheckpoint):
        return False
    layers = (
        spec.stored(layer) for spec in streamed.meta_model.blocks for layer in spec.linears if EXPERT.search(layer)
    )
    return any(layer not in streamed.source.layers for layer in layers)


def _compare(folder: Path, streamed: EvaluatedModel) -> Loaded:
    ids_NS = (torch.arange(1, _SEGMENTS * _TOKENS + 1) * 7 % streamed.meta_model.vocab_size).view(_SEGMENTS, _TOKENS)
    named, dequantized = _named_class(folder) or type(streamed.meta_model.hf_model), False
    found = None
    with suppress(_CannotLoadError):
        found = _keys_and_logits(folder, named, streamed, ids_NS)
    if found is None:  # outside the `with`: while its error is being handled, the first model stays in memory
        release_free_memory()
        dense, dequantized = {"quantization_config": CompressedTensorsConfig(dequantize=True)}, True
        found = _keys_and_logits(folder, named, streamed, ids_NS, **dense)
    unused, found_NSV = found
    if isinstance(streamed.source, PackedCheckpoint):
        streamed = replace(streamed, source=_AsLoaded(streamed.source, dequantized=dequantized))
    expected_NSV = _streamed_logits(streamed, ids_NS)
    difference = ((found_NSV - expected_NSV).abs().max() / expected_NSV.abs().max()).item()
    same = int((found_NSV.argmax(-1) == expected_NSV.argmax(-1)).sum())
    loaded = Loaded(named.__name__, dequantized, unused, difference, same, ids_NS.numel())
    other = difference > _FAR and 2 * same < loaded.tokens if _quantizes_inputs(streamed) else difference > _NEAR
    if other or not torch.isfinite(found_NSV).all():
        raise InputError(folder, f"its logits in transformers differ from the streamed ones. {loaded}.")
    return loaded


def _streamed_logits(streamed: EvaluatedModel, ids_NS: Tensor) -> Tensor:
    """Logits [N, S, V] of the streamed evaluation, on the CPU."""
    with streamed.hidden_states([ids_NS]) as (stream,), streamed.head() as outer:
        segments = (outer.logits(stream.read(index)) for index in range(len(ids_NS)))
        return torch.stack([torch.cat([logits.cpu() for logits in pieces]) for pieces in segments])


def _quantizes_inputs(streamed: EvaluatedModel) -> bool:
    blocks = streamed.meta_model.blocks
    names = (spec.tensors[f"{layer}.weight"] for spec in blocks for layer in spec.linears)
    return any(streamed.source.input_quantizer(name) is not None for name in names)


class _AsLoaded:
    """A quantized checkpoint with the values with which transformers computes.

    transformers dequantizes experts as it loads them, and with `dequantize=True` all layers. Their weights are then rounded to the dtype
    of their scales, and their inputs are not quantized. Without the rounding, a router may choose other experts.

    Args:
        source: the checkpoint.
        dequantized: whether transformers dequantizes all layers, and not only experts.
    """

    def __init__(self, source: PackedCheckpoint, *, dequantized: bool) -> None:
        self._source = source
        self._dequantized = dequantized

    def _is_dense(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._source.layers and (self._dequantized or bool(EXPERT.search(name)))

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One dense tensor, rounded as transformers rounds it."""
        if not self._is_dense(name):
            return self._source.read(name, device=device, dtype=dtype)
        value = self._source.read(name, device=device, dtype=torch.float32)
        return value.to(self._source.scale_dtype(name.removesuffix(".weight"))).to(dtype or torch.float32)

    def input_quantizer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Function that quantizes the inputs of a layer; None if transformers does not quantize them."""
        return None if self._is_dense(name) else self._source.input_quantizer(name)


class _CannotLoadError(InputError):
    """transformers raises an exception as it loads or runs the model."""


def _named_class(folder: Path) -> type[PreTrainedModel] | None:
    """Class that `architectures` in config.json names; None if it names none, or none of transformers."""
    names = read_json(folder, "config.json").get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _keys_and_logits(
    folder: Path,
    named: type[PreTrainedModel],
    streamed: EvaluatedModel,
    ids_NS: Tensor,
    **options: Any,
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the tensors that the class `named` does not use, and the logits [N, S, V] of it or of the causal language model.

    Raises:
        _CannotLoadError: transformers raises an exception.
        InputError: weights are missing, are not used although they are quantized, or differ from those of the checkpoint.
        DeviceMemoryError: the model does not fit in memory.
    """
    model, info = _load(folder, named, options)
    missing = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    unused = tuple(sorted(info["unexpected_keys"]))
    layers = streamed.source.layers if isinstance(streamed.source, PackedCheckpoint) else {}
    lost = [name for name in unused if name.rpartition(".")[0] in layers]
    for keys, what in ((missing, "does not find"), (lost, "does not use")):
        if keys:
            raise InputError(
                folder, f"{named.__name__} of transformers {version('transformers')} {what} {some_shown(keys, _NAMED)}."
            )
    if not issubclass(named, GenerationMixin):  # it has no logits of tokens
        model = _load(folder, type(streamed.meta_model.hf_model), options)[0]
    _require_experts(folder, model, streamed)
    meta_model = streamed.meta_model
    if meta_model.text_model is not meta_model.hf_model and isinstance(model, type(meta_model.hf_model)):
        model = model.get_submodule(path_of(meta_model.hf_model, meta_model.text_model))
    with _reported(folder):
        logits_NSV: Tensor = torch.stack(
            [model(ids_S.unsqueeze(0), use_cache=False).logits[0].float() for ids_S in ids_NS]
        )
    return unused, logits_NSV


def _require_experts(folder: Path, model: Any, streamed: EvaluatedModel) -> None:
    """Check the weights of fused experts, because a short text does not reach every expert.

    Raises:
        InputError: a weight differs from that of the checkpoint.
    """
    if not isinstance(streamed.source, PackedCheckpoint):
        return
    source, held = _AsLoaded(streamed.source, dequantized=False), dict(model.named_parameters())
    for spec, block in zip(streamed.meta_model.blocks, streamed.meta_model.templates, strict=True):
        for layer in spec.linears:
            if EXPERT.search(layer) is None:
                continue
            owner, number, leaf = layer.rsplit(".", 2)
            experts = block.get_submodule(owner)
            part = experts.fused[f"{leaf}.weight"] if isinstance(experts, Experts) else None
            fused = held.get(f"{spec.prefix}.{owner}.{part.tensor}") if part is not None else None
            if part is None or fused is None:
                continue
            found, stored = part.take(fused[int(number)]), spec.tensors[f"{layer}.weight"]
            if not torch.equal(found.float(), source.read(stored, device=found.device, dtype=torch.float32)):
                raise InputError(folder, "differs in transformers from the value in the checkpoint.", tensor=stored)


def _load(folder: Path, kind: type[PreTrainedModel], options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """A model as a class of transformers, and the names of missing and unexpected tensors."""
    fixed: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    with _reported(folder):
        loaded: Any = kind.from_pretrained(folder, output_loading_info=True, **fixed, **options)
        # experts keep the dtype of their scales, and would compute in it; `float` of transformers refuses quantized models
        return nn.Module.float(loaded[0]).eval(), loaded[1]


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Replace every exception of transformers, inside a `with`, by an error with one line. Nothing is printed."""
    try:
        with _silence():
            yield
    except Exception as error:
        if is_out_of_memory(error):
            raise DeviceMemoryError(f"{folder}: the whole model does not fit in memory. Leave out --load.") from error
        reason = shown(str(error).partition("\n")[0])
        raise _CannotLoadError(folder, f"transformers {version('transformers')} cannot load it: {reason}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the progress bars, warnings and reports of transformers and compressed-tensors."""
    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
