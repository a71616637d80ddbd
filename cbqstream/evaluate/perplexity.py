"""Streamed perplexity: the hidden states of all segments lie on disk, and one block at a time is in memory."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from cbqstream.calibration.segments import load_segments
from cbqstream.evaluate.model import Listener, hidden_states, open_model, require_counts, require_folder
from cbqstream.models.compute import choose_device, compute_dtype, make_deterministic
from cbqstream.models.ends import model_ends
from cbqstream.models.skeleton import ModelSkeleton
from cbqstream.records import Compute, WeightSource


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over `num_segments` segments."""

    perplexity: float
    num_segments: int


def evaluate(
    model: Path,
    text: Path,
    *,
    num_samples: int = 64,
    seq_len: int = 512,
    batch_size: int = 4,
    scratch: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    listener: Listener = lambda text: None,
) -> Perplexity:
    """Perplexity of a model on `num_samples` segments spread evenly over a text, in bounded memory.

    Args:
        model: folder of a model, quantized by this project or not.
        text: text or token ids.
        num_samples: segments; all of them if the text has fewer.
        seq_len: tokens in a segment.
        batch_size: segments at once.
        scratch: folder for hidden states.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads; the physical cores by default.
        listener: told of progress.

    Raises:
        InputError: the model or the text cannot be read.
        UsageError: a number or folder that cannot work, or a device that is not there.
    """
    skeleton, source = open_model(model)
    skeleton.check_length(seq_len)
    require_counts(num_samples=num_samples, batch_size=batch_size)
    require_folder(scratch)
    where = choose_device(device)
    make_deterministic(threads)
    tokens_NS = load_segments(
        text, model, num_samples=num_samples, seq_len=seq_len, vocab_size=skeleton.vocab_size, choice="spread"
    )
    compute = Compute(where, compute_dtype(where), batch_size)
    return Perplexity(
        perplexity(skeleton, source, tokens_NS, compute, scratch=scratch, listener=listener), len(tokens_NS)
    )


@torch.no_grad()
def perplexity(
    skeleton: ModelSkeleton,
    source: WeightSource,
    tokens_NS: Tensor,
    compute: Compute,
    *,
    scratch: Path | None = None,
    listener: Listener = lambda text: None,
) -> float:
    """exp of the mean negative log-likelihood of tokens 2..S of every segment; arguments as of `hidden_states`."""
    with hidden_states(skeleton, source, [tokens_NS], compute, scratch=scratch, listener=listener) as (stream,):
        listener("head")
        with model_ends(skeleton, source, device=compute.device, dtype=compute.dtype, only="head") as ends:
            total = 0.0
            for segment, ids_S in enumerate(tokens_NS):
                start = 0
                for logits_TV in ends.logits(stream.read(segment)):
                    next_T = ids_S[start + 1 : start + 1 + len(logits_TV)].to(compute.device)
                    start += len(logits_TV)
                    total += functional.cross_entropy(logits_TV[: len(next_T)], next_T, reduction="sum").double().item()
    return math.exp(total / (tokens_NS.shape[0] * (tokens_NS.shape[1] - 1)))
