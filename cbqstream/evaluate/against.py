"""How far the predictions of a model are from those of another on a text, streamed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cbqstream.calibration.segments import load_segments
from cbqstream.errors import UsageError
from cbqstream.evaluate.model import Listener, hidden_states, open_model, require_counts, require_folder
from cbqstream.models.compute import choose_device, compute_dtype, make_deterministic
from cbqstream.models.ends import model_ends
from cbqstream.records import Compute


@dataclass(frozen=True, slots=True)
class Comparison:
    """Means over all tokens."""

    divergence: float
    """KL(reference || model) of the next token, nats."""
    top1: float
    """Share of tokens after which both find the same one likeliest."""
    num_segments: int


@torch.no_grad()
def compare(
    model: Path,
    reference: Path,
    text: Path,
    *,
    num_samples: int = 64,
    seq_len: int = 512,
    batch_size: int = 4,
    scratch: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    listener: Listener = lambda text: None,
) -> Comparison:
    """Compare a model with `reference`; the other arguments as of `evaluate`. Both heads are in memory at the end.

    Raises:
        InputError: a model or the text cannot be read.
        UsageError: the two have other vocabularies, or a setting cannot work.
    """
    require_counts(num_samples=num_samples, batch_size=batch_size)
    require_folder(scratch)
    (skeleton, source), (first_skeleton, first_source) = open_model(model), open_model(reference)
    if skeleton.vocab_size != first_skeleton.vocab_size:
        raise UsageError(
            f"{model} has {skeleton.vocab_size:,} tokens, {reference} {first_skeleton.vocab_size:,}. Compare like with like."
        )
    skeleton.check_length(seq_len)
    where = choose_device(device)
    make_deterministic(threads)
    compute = Compute(where, compute_dtype(where), batch_size)
    tokens_NS = load_segments(
        text, model, num_samples=num_samples, seq_len=seq_len, vocab_size=skeleton.vocab_size, choice="spread"
    )
    at: dict[str, Any] = {"device": compute.device, "dtype": compute.dtype}
    with (
        hidden_states(first_skeleton, first_source, [tokens_NS], compute, scratch=scratch, listener=listener) as (
            goal,
        ),
        hidden_states(skeleton, source, [tokens_NS], compute, scratch=scratch, listener=listener) as (found,),
        model_ends(first_skeleton, first_source, **at, only="head") as first_ends,
        model_ends(skeleton, source, **at, only="head") as ends,
    ):
        listener("heads")
        divergence, same = 0.0, 0
        for segment in range(len(tokens_NS)):
            pairs = zip(first_ends.logits(goal.read(segment)), ends.logits(found.read(segment)), strict=True)
            for goal_TV, found_TV in pairs:
                logs = functional.kl_div(
                    found_TV.log_softmax(-1), goal_TV.log_softmax(-1), log_target=True, reduction="sum"
                )
                divergence += logs.double().item()
                same += int((goal_TV.argmax(-1) == found_TV.argmax(-1)).sum())
    return Comparison(divergence / tokens_NS.numel(), same / tokens_NS.numel(), len(tokens_NS))
