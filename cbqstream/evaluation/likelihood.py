"""Log-likelihoods of continuations. Each block is read once and run on all requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cbqstream.evaluation.model import EvaluatedModel

_LENGTHS = 32
"""Requests are padded on the right to a multiple of this number of tokens. In a causal model, padding on the right changes no score."""


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids of a text whose last tokens are scored."""

    ids: tuple[int, ...]
    scored: int
    """Number of tokens that are scored, from 1 to all but one."""

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.ids):
            raise ValueError(f"{self.scored} of {len(self.ids)} tokens are to be scored")


class Scored(NamedTuple):
    """Score of the last tokens of a request."""

    log_likelihood: float
    """Sum of the log-likelihoods of the tokens, in nats."""
    greedy: bool
    """Whether each of the tokens is the most likely one at its position."""


@torch.no_grad()
def log_likelihoods(model: EvaluatedModel, requests: Sequence[Request]) -> list[Scored]:
    """Scores of the last tokens of each request. The model does not read the last token of a request, after which nothing is predicted.

    Raises:
        UsageError: a request is longer than the learned positions of the model.
    """
    if not requests:
        return []
    model.meta_model.check_length(max(2, *(len(request.ids) - 1 for request in requests)))
    members: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        members.setdefault(-(-(len(request.ids) - 1) // _LENGTHS) * _LENGTHS, []).append(index)
    groups = [torch.tensor([_seen(requests[index], length) for index in held]) for length, held in members.items()]
    scores = [Scored(0.0, greedy=True)] * len(requests)
    with model.hidden_states(groups) as stores, model.head() as outer:
        for store, held in zip(stores, members.values(), strict=True):
            for segment, index in enumerate(held):
                request = requests[index]
                first, stop = len(request.ids) - request.scored, len(request.ids)
                wanted_T = torch.tensor(request.ids[first:stop], device=model.compute.device)
                total, greedy, start = 0.0, True, 0
                for logits_TV in outer.logits(store.read(segment)[first - 1 : stop - 1]):
                    next_T = wanted_T[start : start + len(logits_TV)]
                    start += len(logits_TV)
                    chosen = logits_TV.log_softmax(-1).gather(1, next_T.unsqueeze(1))
                    total += chosen.sum(dtype=torch.float64).item()
                    greedy = greedy and torch.equal(logits_TV.argmax(-1), next_T)
                scores[index] = Scored(total, greedy)
    return scores


def _seen(request: Request, length: int) -> list[int]:
    """Token ids that the model reads for a request, padded to `length`."""
    ids = request.ids[:-1]
    return [*ids, *[0] * (length - len(ids))]
