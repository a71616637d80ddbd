"""Comparison of a model that transformers loads as a whole with the evaluation block by block."""

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
from cbqstream.packed.packed_checkpoint import PackedCheckpoint
from cbqstream.runtime.device import fixed_numerics
from cbqstream.runtime.memory import is_out_of_memory, release_free_memory

_TOKENS = 16
_NEAR, _FAR = 0.02, 0.2
"""Allowed differences of a logit, as shares of the largest logit.

The first is for differences of float32 arithmetic. The second is for weights rounded to bf16, or inputs rounded to a neighboring code.
"""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Result of loading a model with transformers and comparing its logits with those of the streamed evaluation."""

    dequantized: bool
    """Whether the model was loaded with `dequantize=True`, that is with dense bf16 weights and without quantized inputs."""
    difference: float
    """Largest difference of a logit, as a share of the largest logit."""
    same: int
    """Number of tokens after which both evaluations have the same most likely next token."""
    tokens: int
    """Number of all tokens."""

    def __str__(self) -> str:
        way = " with dequantize=True" if self.dequantized else ""
        near = f"logits within {self.difference:.1e} of the streamed ones, same next token after {self.same} of {self.tokens}"
        return f"transformers {version('transformers')} loads it{way}: {near}"


@torch.no_grad()
def load_beside_streamed(folder: Path, **options: Unpack[EvaluationOptions]) -> Loaded:
    """Load a model with transformers and compare its logits on 16 tokens with those of the streamed evaluation.

    If transformers cannot load the model without options, it is loaded with `dequantize=True`. The whole model is in memory.

    Args:
        folder: folder of a model, quantized by this project or not.
        options: see `EvaluationOptions`.

    Raises:
        InputError: transformers cannot load the model either way, or its logits differ.
        DeviceMemoryError: the model does not fit in memory.
    """
    streamed = EvaluatedModel.open(folder, **options)
    with fixed_numerics(streamed.compute.device, streamed.threads):
        return _compare(folder, streamed)


def _compare(folder: Path, streamed: EvaluatedModel) -> Loaded:
    ids_1S = torch.arange(1, _TOKENS + 1).unsqueeze(0) * 7 % streamed.meta_model.vocab_size
    with streamed.hidden_states([ids_1S]) as (stream,), streamed.head() as outer:
        expected_SV = torch.cat([logits.cpu() for logits in outer.logits(stream.read(0))])
    found_SV, dequantized = None, False
    with suppress(InputError):
        found_SV = _logits(streamed.meta_model.config, folder, ids_1S)
    if found_SV is None:  # outside the `with`: while its error is being handled, the first model stays in memory
        release_free_memory()
        dense = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        found_SV, dequantized = _logits(streamed.meta_model.config, folder, ids_1S, **dense), True
    difference = ((found_SV - expected_SV).abs().max() / expected_SV.abs().max()).item()
    same = int((found_SV.argmax(-1) == expected_SV.argmax(-1)).sum())
    loaded = Loaded(dequantized, difference, same, len(expected_SV))
    inputs_rounded = isinstance(streamed.source, PackedCheckpoint) and streamed.source.schemes.default.activation_bits
    exact = not dequantized and not inputs_rounded
    other = difference > _NEAR if exact else difference > _FAR and 2 * same < loaded.tokens
    if other or not torch.isfinite(found_SV).all():
        raise InputError(folder, f"its logits in transformers differ from the streamed ones. {loaded}.")
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
                raise DeviceMemoryError(
                    f"{folder}: the whole model does not fit in memory. Leave out --load."
                ) from error
            reason = shown(str(error).partition("\n")[0])
            raise InputError(folder, f"transformers {version('transformers')} cannot load it: {reason}") from error
    return logits_SV


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
