"""Log-probabilities of the tokens of a text by the streamed evaluation, with which other programs are compared."""

from pathlib import Path

import torch

from cbqstream.evaluation.model import EvaluatedModel


@torch.no_grad()
def streamed_log_probabilities(model: Path, ids_NS: torch.Tensor, threads: int) -> list[list[float]]:
    """Log-probabilities of tokens 2 to S of each segment, computed in float32.

    Args:
        model: folder of the model.
        ids_NS: token ids.
        threads: CPU threads.
    """
    streamed, found = EvaluatedModel.open(model, device="cpu", threads=threads), []
    with streamed.hidden_states([ids_NS]) as (stream,), streamed.head() as outer:
        for segment, ids_S in enumerate(ids_NS):
            logs_SV = torch.cat([logits.log_softmax(-1) for logits in outer.logits(stream.read(segment))])
            found.append(logs_SV[:-1].gather(1, ids_S[1:].unsqueeze(1)).flatten().tolist())
    return found
