"""Divergence of the predictions of a model from those of a reference model on a text, with one block in memory at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch.nn import functional

from cbqstream.errors import UsageError
from cbqstream.evaluation.model import EvaluatedModel, EvaluationOptions, require_counts
from cbqstream.evaluation.perplexity import segments


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of the predictions of two models, as means over all tokens."""

    divergence: float
    """KL(reference || model) of the distribution of the next token, in nats."""
    top1: float
    """Share of tokens after which both models have the same most likely next token."""
    num_segments: int
    """Number of segments of the text."""


@torch.no_grad()
def compare(
    model: Path,
    reference: Path,
    text: Path,
    *,
    num_samples: int = 64,
    seq_len: int = 512,
    bos: bool = False,
    **options: Unpack[EvaluationOptions],
) -> Comparison:
    """Compare the predictions of a model with those of a reference. At the end the heads of both models are in memory.

    Args:
        model: folder of a model, quantized by this project or not.
        reference: folder of the reference model.
        text: text or token ids.
        num_samples: number of segments, spread evenly over the text; all of them if the text has fewer.
        seq_len: tokens in a segment.
        bos: see `evaluate`.
        options: see `EvaluationOptions`.

    Raises:
        InputError: a model or the text cannot be read.
        UsageError: the models have vocabularies of different sizes, or a setting cannot work.
    """
    require_counts(num_samples=num_samples)
    first, second = EvaluatedModel.open(reference, **options), EvaluatedModel.open(model, **options)
    sizes = second.meta_model.vocab_size, first.meta_model.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the vocabulary of {model} has {sizes[0]:,} tokens, that of {reference} {sizes[1]:,}. Give another reference."
        )
    tokens_NS = segments(second, model, text, num_samples, seq_len, bos=bos)
    with (
        first.hidden_states([tokens_NS]) as (goal,),
        second.hidden_states([tokens_NS]) as (found,),
        first.head() as reference_outer,
        second.head() as outer,
    ):
        divergence, same = 0.0, 0
        for segment in range(len(tokens_NS)):
            pairs = zip(reference_outer.logits(goal.read(segment)), outer.logits(found.read(segment)), strict=True)
            for goal_TV, found_TV in pairs:
                logs = functional.kl_div(
                    found_TV.log_softmax(-1), goal_TV.log_softmax(-1), log_target=True, reduction="sum"
                )
                divergence += logs.double().item()
                same += int((goal_TV.argmax(-1) == found_TV.argmax(-1)).sum())
    return Comparison(divergence / tokens_NS.numel(), same / tokens_NS.numel(), len(tokens_NS))
