"""Streamed perplexity: the hidden states of all segments lie on disk, and one block at a time is in memory."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional

from cbqstream.calibration.segments import TOKEN_FILES, load_segments
from cbqstream.errors import UsageError
from cbqstream.evaluation.model import EvaluatedModel, EvaluationOptions, require_counts

_LARGEST = 700.0
"""Nats; exp of more is not a number that floats hold."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over `num_segments` segments."""

    perplexity: float
    num_segments: int


def evaluate(
    model: Path | str,
    text: Path | str,
    *,
    num_samples: int = 64,
    seq_len: int = 512,
    bos: bool = False,
    **options: Unpack[EvaluationOptions],
) -> Perplexity:
    """Perplexity of a model on `num_samples` segments spread evenly over a text, in bounded memory.

    Args:
        model: folder of a model, quantized by this project or not.
        text: text or token ids.
        num_samples: segments; all of them if the text has fewer.
        seq_len: tokens in a segment.
        bos: begin every segment as the tokenizer begins a text; by the usual convention only the first of a text does.
        options: see `EvaluationOptions`.

    Raises:
        InputError: the model or the text cannot be read.
        UsageError: a number or folder that cannot work, or a device that is not there.
    """
    require_counts(num_samples=num_samples)
    folder = Path(model)
    streamed = EvaluatedModel.open(folder, **options)
    tokens_NS = segments(streamed, folder, Path(text), num_samples, seq_len, bos=bos)
    return Perplexity(perplexity(streamed, tokens_NS), len(tokens_NS))


def segments(
    streamed: EvaluatedModel, folder: Path, text: Path, num_samples: int, seq_len: int, *, bos: bool
) -> Tensor:
    """Token ids int64 [N, S] of segments spread evenly over a text.

    Raises:
        UsageError: token ids cannot be begun.
    """
    if bos and text.suffix.lower() in TOKEN_FILES:
        raise UsageError(f"{text}: token ids are taken as they are. Leave out --bos, or give text.")
    streamed.meta_model.check_length(seq_len)
    size = streamed.meta_model.vocab_size
    sizes = {"num_samples": num_samples, "seq_len": seq_len, "vocab_size": size}
    return load_segments(text, folder, **sizes, choice="spread", begun=bos)


@torch.no_grad()
def perplexity(model: EvaluatedModel, tokens_NS: Tensor) -> float:
    """exp of the mean negative log-likelihood of tokens 2..S of every segment."""
    with model.hidden_states([tokens_NS]) as (stream,), model.head() as outer:
        total = 0.0
        for segment, ids_S in enumerate(tokens_NS):
            start = 0
            for logits_TV in outer.logits(stream.read(segment)):
                next_T = ids_S[start + 1 : start + 1 + len(logits_TV)].to(model.compute.device)
                start += len(logits_TV)
                total += functional.cross_entropy(logits_TV[: len(next_T)], next_T, reduction="sum").double().item()
    mean = total / (tokens_NS.shape[0] * (tokens_NS.shape[1] - 1))
    return math.exp(mean) if mean < _LARGEST else math.inf
