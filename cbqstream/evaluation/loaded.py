"""A model as plain transformers loads it, beside the streamed one. The whole model is in memory, so it is for models that fit."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from importlib.metadata import version
from logging import CRITICAL
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
)
from transformers.utils import logging

from cbqstream.errors import DeviceMemoryError, InputError, shown
from cbqstream.evaluation.model import EvaluatedModel, EvaluationOptions
from cbqstream.packed.packed_checkpoint import PackedSource
from cbqstream.runtime.memory import is_out_of_memory, release_free_memory

_TOKENS = 16
_NEAR, _FAR = 0.02, 0.2
"""Shares of the largest logit: what float32 can differ by, and what rounding to bf16, or of inputs to the next code, can."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a model was loaded, and how near its logits are to those of the streamed evaluation."""

    dequantized: bool
    """Whether it had to be asked to make dense weights, which are bf16 and whose inputs are not quantized."""
    difference: float
    """Largest difference of a logit, in shares of the largest logit."""
    same: int
    """Tokens after which both think the same one the likeliest."""
    tokens: int

    def __str__(self) -> str:
        how = ", asked to dequantize it" if self.dequantized else ""
        near = f"logits within {self.difference:.1e} of the streamed ones, same next token after {self.same} of {self.tokens}"
        return f"transformers {version('transformers')} loads it{how}: {near}"


@torch.no_grad()
def load_beside_streamed(folder: Path, **how: Unpack[EvaluationOptions]) -> Loaded:
    """Load a model with transformers, plainly or else dequantized, and compare its logits on a few tokens.

    Raises:
        InputError: neither way loads it, or what it says then is something else.
        DeviceMemoryError: it does not fit in memory.
    """
    streamed = EvaluatedModel.open(folder, **how)
    ids_1S = torch.arange(1, _TOKENS + 1).unsqueeze(0) * 7 % streamed.meta_model.vocab_size
    with streamed.hidden_states([ids_1S]) as (stream,), streamed.head() as outer:
        expected_SV = torch.cat([logits.cpu() for logits in outer.logits(stream.read(0))])
    found_SV, dequantized = None, False
    with suppress(InputError):
        found_SV = _logits(streamed.meta_model.config, folder, ids_1S)
    if found_SV is None:  # out of reach of the error, which would keep the first model in memory
        release_free_memory()
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        found_SV, dequantized = _logits(streamed.meta_model.config, folder, ids_1S, **options), True
    difference = ((found_SV - expected_SV).abs().max() / expected_SV.abs().max()).item()
    same = int((found_SV.argmax(-1) == expected_SV.argmax(-1)).sum())
    loaded = Loaded(dequantized, difference, same, len(expected_SV))
    inputs_rounded = isinstance(streamed.source, PackedSource) and streamed.source.schemes.default.activation_bits
    exact = not dequantized and not inputs_rounded
    other = difference > _NEAR if exact else difference > _FAR and 2 * same < loaded.tokens
    if other or not torch.isfinite(found_SV).all():
        raise InputError(folder, f"is another model in transformers. {loaded}.")
    return loaded


def _logits(config: Any, folder: Path, ids_1S: Tensor, **options: Any) -> Tensor:
    auto: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    with _silence():
        try:
            options |= {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
            model = auto.from_pretrained(folder, **options).eval()
            logits_SV: Tensor = model(ids_1S, use_cache=False).logits[0].float()
        except Exception as error:
            if is_out_of_memory(error):
                raise DeviceMemoryError(f"{folder}: does not fit in memory as a whole. Leave out --load.") from error
            what = shown(str(error).partition("\n")[0])
            raise InputError(folder, f"transformers {version('transformers')} does not load it: {what}") from error
    return logits_SV


@contextmanager
def _silence() -> Iterator[None]:
    """transformers and compressed-tensors report on what they load in bars, warnings and pages of text."""
    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
