"""Perplexity of a model on a text, with one block in memory at a time and the hidden states of all segments on disk."""

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
"""Largest loss, in nats, whose exponential is computed; a float cannot represent the exponential of much larger losses."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of a model on a text."""

    perplexity: float
    num_segments: int
    """Number of segments of the text."""


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
        num_samples: number of segments; all of them if the text has fewer.
        seq_len: tokens in a segment.
        bos: begin every segment with the special tokens with which the tokenizer begins a text. By the usual convention only the first
            segment of a text has them.
        options: see `EvaluationOptions`.

    Raises:
        InputError: the model or the text cannot be read.
        UsageError: a number, folder or device cannot work.
    """
    require_counts(num_samples=num_samples)
    folder = Path(model)
    streamed = EvaluatedModel.open(folder, **options)
    tokens_NS = segments(streamed, folder, Path(text), num_samples, seq_len, bos=bos)
    return Perplexity(perplexity(streamed, tokens_NS), len(tokens_NS))


def segments(
    streamed: EvaluatedModel, folder: Path, text: Path, num_samples: int, seq_len: int, *, bos: bool
) -> Tensor:
    """Segments spread evenly over a text, as token ids int64 [N, S].

    Args:
        streamed: the model, which limits the length of a segment and the token ids.
        folder: folder of the model, for its tokenizer.
        text: text or token ids.
        num_samples: number of segments N; all of them if the text has fewer.
        seq_len: tokens S in a segment.
        bos: begin every segment with the special tokens with which the tokenizer begins a text.

    Raises:
        InputError: the text cannot be read.
        UsageError: `bos` is set for a file of token ids, or the segments are too long.
    """
    if bos and text.suffix.lower() in TOKEN_FILES:
        raise UsageError(f"{text}: token ids are used unchanged. Leave out --bos, or give text.")
    streamed.meta_model.check_length(seq_len)
    size = streamed.meta_model.vocab_size
    sizes = {"num_samples": num_samples, "seq_len": seq_len, "vocab_size": size}
    return load_segments(text, folder, **sizes, choice="spread", begun=bos)


@torch.no_grad()
def perplexity(model: EvaluatedModel, tokens_NS: Tensor) -> float:
    """Exponential of the mean negative log-likelihood of the tokens 2 to S of all segments.

    Args:
        model: the model.
        tokens_NS: token ids of the segments, int64.
    """
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
