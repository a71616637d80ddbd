"""Choice tasks, streamed: which of several continuations of a prompt a model finds likeliest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from cbqstream.calibration.segments import load_tokenizer
from cbqstream.errors import InputError, UsageError
from cbqstream.evaluation.likelihood import Request, log_likelihoods
from cbqstream.evaluation.model import EvaluatedModel, EvaluationOptions, require_counts


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its possible continuations, and the number of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right answers by the sum of log-likelihoods, and by that sum over the characters of a choice; and what was answered."""

    by_sum: float
    by_character: float
    answers: tuple[int, ...]
    """By the sum, for every question."""


def read_questions(path: Path, number: int | None = None) -> list[Question]:
    """The first questions of a jsonl file, each `{"prompt": ..., "choices": [...], "answer": 0}`.

    Raises:
        InputError: the file cannot be read, or a line is none.
    """
    questions: list[Question] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other ends of a line
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "cannot be read as UTF-8 text.") from error
    for place, line in enumerate(lines, 1):
        if number is not None and len(questions) == number:
            break
        if line.strip():
            questions.append(_question(path, place, line))
    if not questions:
        raise InputError(path, "holds no questions.")
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
    """Accuracy of a model on the questions of a jsonl file, in bounded memory: every block is read once.

    Args:
        model: folder of a model, quantized by this project or not.
        questions: see `read_questions`.
        num_questions: the first so many; all by default.
        options: see `EvaluationOptions`.

    Raises:
        InputError: the model or the questions cannot be read.
        UsageError: a question is longer than the model's positions, or a setting cannot work.
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
    right = [question.answer for question in asked]
    return Accuracy(_share(by_sum, right), _share(by_character, right), tuple(by_sum))


def _request(tokenizer: Any, prompt: str, choice: str) -> Request:
    """As lm-eval splits them: what the prompt alone takes is not scored, and spaces at its end belong to the choice."""
    before = tokenizer(prompt.rstrip())["input_ids"]
    ids = tokenizer(prompt + choice)["input_ids"]
    if not before or len(before) >= len(ids):
        raise UsageError(f"the prompt {prompt[:40]!r} or its continuation {choice[:40]!r} has no token of its own.")
    return Request(tuple(ids), len(ids) - len(before))


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _share(found: Sequence[int], right: Sequence[int]) -> float:
    return sum(one == other for one, other in zip(found, right, strict=True)) / len(right)
