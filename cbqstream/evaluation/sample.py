"""Continuation of a prompt by a model that does not fit in memory. It is slow, because each token reads the whole model once."""

from pathlib import Path
from typing import Unpack

import torch

from cbqstream.calibration.tokenizer import load_tokenizer
from cbqstream.errors import UsageError
from cbqstream.evaluation.model import EvaluatedModel, EvaluationOptions, require_counts


@torch.no_grad()
def sample(model: Path, prompt: str, *, num_tokens: int = 16, **options: Unpack[EvaluationOptions]) -> str:
    """Continue a prompt with the most likely token each time, until the model ends the text or `num_tokens` tokens are written.

    Args:
        model: folder of a model, quantized by this project or not.
        prompt: the beginning of the text.
        num_tokens: largest number of tokens to write.
        options: see `EvaluationOptions`.

    Returns:
        The continuation, without the prompt.

    Raises:
        InputError: the model or its tokenizer cannot be read.
        UsageError: the prompt has no tokens, or a setting cannot work.
    """
    require_counts(num_tokens=num_tokens)
    streamed, tokenizer = EvaluatedModel.open(model, **options), load_tokenizer(model)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise UsageError("the prompt has no tokens. Give at least one word.")
    streamed.meta_model.check_length(len(ids) + num_tokens)
    first = len(ids)
    while len(ids) < first + num_tokens:
        with streamed.hidden_states([torch.tensor([ids])]) as (stream,), streamed.head() as outer:
            (logits_TV,) = outer.logits(stream.read(0)[-1:])
        ids.append(int(logits_TV.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    before, after = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:first], ids))
    return after.removeprefix(before)  # decoded alone, the continuation would lose its leading space
