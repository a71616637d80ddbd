"""Perplexity of a model, computed by this project and by transformers. Tests require that the two agree."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from cbqstream.evaluation.model import EvaluatedModel, open_model
from cbqstream.evaluation.perplexity import perplexity
from cbqstream.records import Compute
from tiny import auto_class


def streamed_perplexity(folder: Path, ids_NS: Tensor) -> float:
    """Perplexity by the streamed evaluation of this project, with all segments in one batch as in `plain_perplexity`."""
    compute = Compute(torch.device("cpu"), torch.float32, len(ids_NS))
    return perplexity(EvaluatedModel(*open_model(folder), compute), ids_NS)


@torch.no_grad()
def plain_perplexity(folder: Path, ids_NS: Tensor, **options: Any) -> float:
    """Perplexity by transformers alone. Options are those of `from_pretrained`."""
    options = {"dtype": torch.float32, **options}
    model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **options).eval()
    logits = model(ids_NS, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten()).exp().item()
