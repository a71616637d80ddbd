"""Multiple-choice questions: the most likely of several continuations of a prompt, with one block in memory at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from cbqstream.calibration.tokenizer import load_tokenizer
from cbqstream.errors import InputError, UsageError
from cbqstream.evaluation.likelihood import Request, log_likelihoods
from cbqstream.evaluation.model import EvaluatedModel, EvaluationOptions, require_counts


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its possible continuations, and the correct one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    """Index of the correct choice."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy of a model on questions, and its answers."""

    by_sum: float
    """Share of questions whose correct choice has the largest log-likelihood."""
    by_character: float
    """Share of questions whose correct choice has the largest log-likelihood per character."""
    answers: tuple[int, ...]
    """Index of the choice with the largest log-likelihood, for every question."""


def read_questions(path: Path, number: int | None = None) -> list[Question]:
    """Questions from a jsonl file with lines of the form `{"prompt": ..., "choices": [...], "answer": 0}`.

    Args:
        path: the file, in UTF-8; empty lines are skipped.
        number: largest number of questions, from the start of the file; None reads all.

    Raises:
        InputError: the file cannot be read, has no questions, or a line is not a question.
    """
    questions: list[Question] = []
    try:
        # not `splitlines`, because a text may contain other line separators
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "cannot be read as UTF-8 text.") from error
    for place, line in enumerate(lines, 1):
        if number is not None and len(questions) == number:
            break
        if line.strip():
            questions.append(_question(path, place, line))
    if not questions:
        raise InputError(path, "contains no questions. Give a file with one question per line.")
    return questions


def _question(path: Path, place: int, line: str) -> Question:
    try:
        content = json.loads(line)
        prompt, choices, answer = content["prompt"], content["choices"], content["answer"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(path, f'line {place} is not a JSON object with "prompt", "choices" and "answer".') from error
    texts = (
        isinstance(choices, list) and len(choices) > 1 and all(isinstance(choice, str) and choice for choice in choices)
    )
    if not isinstance(prompt, str) or not texts or type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            path, f'line {place}: "choices" must be two or more texts, and "answer" the number of one, from 0.'
        )
    return Question(prompt, tuple(choices), answer)


def evaluate_choices(
    model: Path, questions: Path, *, num_questions: int | None = None, **options: Unpack[EvaluationOptions]
) -> Accuracy:
    """Accuracy of a model on the questions of a jsonl file, in bounded memory. Every block is read once for all questions.

    Args:
        model: folder of a model, quantized by this project or not.
        questions: the jsonl file, see `read_questions`.
        num_questions: largest number of questions, from the start of the file; all by default.
        options: see `EvaluationOptions`.

    Raises:
        InputError: the model or the questions cannot be read.
        UsageError: a question is longer than the learned positions of the model, or a setting cannot work.
    """
    require_counts(num_questions=num_questions)
    asked = read_questions(questions, num_questions)
    streamed, tokenizer = EvaluatedModel.open(model, **options), load_tokenizer(model)
    requests = [_request(tokenizer, question.prompt, choice) for question in asked for choice in question.choices]
    scores = iter(scored.log_likelihood for scored in log_likelihoods(streamed, requests))
    by_sum, by_character = [], []
    for question in asked:
        found = [next(scores) for _ in question.choices]
        by_sum.append(_largest(found))
        by_character.append(_largest([score / len(text) for score, text in zip(found, question.choices, strict=True)]))
    correct = [question.answer for question in asked]
    return Accuracy(_share(by_sum, correct), _share(by_character, correct), tuple(by_sum))


def _request(tokenizer: Any, prompt: str, choice: str) -> Request:
    """Tokens of a prompt and a choice, of which those of the choice are scored.

    The split is that of lm-eval: the prompt has as many tokens as without the choice, and spaces at its end belong to the choice.
    """
    prompt_ids = tokenizer(prompt.rstrip())["input_ids"]
    ids = tokenizer(prompt + choice)["input_ids"]
    if not prompt_ids or len(prompt_ids) >= len(ids):
        raise UsageError(
            f"the prompt {prompt[:40]!r} or its continuation {choice[:40]!r} has no token of its own. Remove the question."
        )
    return Request(tuple(ids), len(ids) - len(prompt_ids))


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _share(found: Sequence[int], correct: Sequence[int]) -> float:
    return sum(one == other for one, other in zip(found, correct, strict=True)) / len(correct)
