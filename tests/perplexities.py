"""Perplexity of a tiny model in two ways that must agree."""

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
    """By this project, block by block; all segments at once, as transformers has them."""
    compute = Compute(torch.device("cpu"), torch.float32, len(ids_NS))
    return perplexity(EvaluatedModel(*open_model(folder), compute), ids_NS)


@torch.no_grad()
def plain_perplexity(folder: Path, ids_NS: Tensor, **options: Any) -> float:
    """By transformers alone."""
    options = {"dtype": torch.float32, **options}
    model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **options).eval()
    logits = model(ids_NS, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten()).exp().item()
