"""Choices and comparisons, streamed, against transformers on the whole model."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cbqstream.calibration.segments import load_segments
from cbqstream.errors import InputError, UsageError
from cbqstream.evaluation.against import compare
from cbqstream.evaluation.choices import evaluate_choices, read_questions
from cbqstream.evaluation.likelihood import Request, log_likelihoods
from cbqstream.evaluation.model import EvaluatedModel, open_model
from cbqstream.evaluation.sample import sample
from cbqstream.records import Compute
from tiny import FAMILIES, SEQ_LEN, SOME_FAMILIES, VOCAB, make_model, save_model, save_tokenizer

CPU = Compute(torch.device("cpu"), torch.float32, 3)
WORDS = "the quick brown fox jumps over the lazy dog and then that other one"


def plain(model, request):
    """Of a request alone, by transformers."""
    with torch.no_grad():
        logs = model(torch.tensor([request.ids]), use_cache=False).logits[0].log_softmax(-1)
    first = len(request.ids) - request.scored
    return sum(logs[place - 1, request.ids[place]].item() for place in range(first, len(request.ids)))


@torch.no_grad()
def is_greedy(model, request):
    first = len(request.ids) - request.scored
    likeliest = model(torch.tensor([request.ids]), use_cache=False).logits[0].argmax(-1)[first - 1 : -1]
    return likeliest.tolist() == list(request.ids[first:])


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_log_likelihoods_are_those_of_requests_alone(tmp_path, family):
    """What fills requests up to one length changes nothing; lengths are mixed, and each has its place in the answer."""
    model = make_model(family)
    folder = save_model(tmp_path / family, family, dtype=torch.float32)
    chance = torch.Generator().manual_seed(0)
    requests = []
    for length in (2, 7, 40, 33, 32, 31, 7, 50):
        ids = torch.randint(0, VOCAB, (length,), generator=chance).tolist()
        requests.append(Request(tuple(ids), max(1, length // 3)))
    with torch.no_grad():
        likeliest = model(torch.tensor([requests[1].ids]), use_cache=False).logits[0, -1].argmax().item()
    requests.append(Request((*requests[1].ids, likeliest), 1))
    found = log_likelihoods(EvaluatedModel(*open_model(folder), CPU), requests)
    assert [scored.log_likelihood for scored in found] == pytest.approx(
        [plain(model, request) for request in requests], rel=1e-4
    )
    assert [scored.greedy for scored in found] == [is_greedy(model, request) for request in requests]


@pytest.fixture
def with_tokenizer(tmp_path):
    folder = save_model(tmp_path / "m", "llama", vocab_size=304, dtype=torch.float32)
    tokenizer = save_tokenizer(folder, [WORDS] * 9)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder, tokenizer


def test_accuracy(with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer
    model = make_model("llama", vocab_size=304)
    words = WORDS.split()
    lines, sums, shares = [], [], []
    for index in range(9):
        prompt, choices = (
            f"{words[index]} {words[index + 1]}",
            [f" {words[index + 2]}", f" {words[index + 3]} dog", " x"],
        )
        choices = choices[index % 3 :] + choices[: index % 3]
        scores = []
        for choice in choices:
            ids = tokenizer.encode(prompt + choice).ids
            scores.append(plain(model, Request(tuple(ids), len(ids) - len(tokenizer.encode(prompt).ids))))
        sums.append(scores.index(max(scores)))
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        shares.append(by_length.index(max(by_length)))
        lines.append({"prompt": prompt, "choices": choices, "answer": index % 3})
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = evaluate_choices(folder, file, threads=1, device="cpu")
    assert found.answers == tuple(sums)
    assert len(set(sums)) > 1
    assert found.by_sum == pytest.approx(sum(one == index % 3 for index, one in enumerate(sums)) / 9)
    assert found.by_character == pytest.approx(sum(one == index % 3 for index, one in enumerate(shares)) / 9)
    assert evaluate_choices(folder, file, num_questions=4, threads=1, device="cpu").answers == tuple(sums[:4])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", 'line 2 is not a JSON object with "prompt", "choices" and "answer"'),
        ('{"prompt": "a", "choices": ["b", "c"]}', 'line 2 is not a JSON object with "prompt"'),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', 'line 2: "choices" must be two or more texts'),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', 'line 2: "choices" must be two or more texts'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', '"answer" the number of one, from 0'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', '"answer" the number of one, from 0'),
    ],
)
def test_questions_that_are_none(tmp_path, line, message):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}\n' + line)
    with pytest.raises(InputError, match=message):
        read_questions(file)
    assert len(read_questions(file, 1)) == 1


def test_no_questions(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="holds no questions"):
        read_questions(tmp_path / "empty")


def test_comparison(tmp_path, tokens):
    near, far = make_model("llama"), make_model("qwen3", seed=1)
    folders = [
        save_model(tmp_path / "llama", "llama", dtype=torch.float32),
        save_model(tmp_path / "qwen3", "qwen3", seed=1, dtype=torch.float32),
    ]
    ids = load_segments(tokens, folders[0], num_samples=5, seq_len=SEQ_LEN, vocab_size=VOCAB, choice="spread")
    with torch.no_grad():
        goal, found = (model(ids, use_cache=False).logits.flatten(0, 1) for model in (near, far))
    divergence = functional.kl_div(
        found.log_softmax(-1), goal.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()
    same = (goal.argmax(-1) == found.argmax(-1)).float().mean().item()
    options = {"num_samples": 5, "seq_len": SEQ_LEN, "threads": 1, "device": "cpu"}
    measured = compare(folders[1], folders[0], tokens, **options)
    assert (measured.divergence, measured.top1) == (pytest.approx(divergence, rel=1e-4), pytest.approx(same, abs=1e-6))
    itself = compare(folders[0], folders[0], tokens, **options)
    assert (itself.divergence, itself.top1) == (pytest.approx(0, abs=1e-6), 1.0)
    other = save_model(tmp_path / "other", "llama", vocab_size=128)
    with pytest.raises(UsageError, match=r"has 128 tokens, .* 96\. Compare like with like"):
        compare(other, folders[0], tokens, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_questions": -1}, "num_questions is -1"),
        ({"scratch": Path("/no")}, "no such folder"),
    ],
)
def test_numbers_that_cannot_be(tmp_path, options, message):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}')
    with pytest.raises(UsageError, match=message):
        evaluate_choices(tmp_path, file, **options)


def test_spaces_at_the_end_of_a_prompt_belong_to_the_choice(with_tokenizer, tmp_path):
    folder, _ = with_tokenizer
    answers = []
    for prompt, choices in (("the quick", [" brown", " lazy", " x"]), ("the quick ", ["brown", "lazy", "x"])):
        file = tmp_path / "questions.jsonl"
        file.write_text(json.dumps({"prompt": prompt, "choices": choices, "answer": 0}))
        answers.append(evaluate_choices(folder, file, threads=1, device="cpu").answers)
    assert answers[0] == answers[1]


def test_a_sample_is_what_transformers_writes(with_tokenizer):
    folder, tokenizer = with_tokenizer
    ids = tokenizer.encode(WORDS).ids
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = plain.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert sample(folder, WORDS, num_tokens=6, threads=1, device="cpu") == tokenizer.decode(written.tolist())
    with pytest.raises(UsageError, match="the prompt has no tokens"):
        sample(folder, "", threads=1, device="cpu")
    with pytest.raises(UsageError, match="num_tokens is 0"):
        sample(folder, "a", num_tokens=0, threads=1, device="cpu")


def test_a_sample_ends_with_the_text(with_tokenizer):
    folder, tokenizer = with_tokenizer
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        token = tokenizer.id_to_token(plain(torch.tensor([tokenizer.encode(WORDS).ids])).logits[0, -1].argmax().item())
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, "eos_token": token}))
    assert sample(folder, WORDS, num_tokens=9, threads=1, device="cpu") == ""


def test_no_requests(tmp_path):
    assert log_likelihoods(EvaluatedModel(*open_model(save_model(tmp_path / "m")), CPU), []) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_length(tiny_models, family):
    assert open_model(tiny_models[family])[0].max_length >= 16


def test_a_sample_keeps_the_space_that_it_begins_with(with_tokenizer):
    """Of tokenizers that leave out the first space of what they decode."""
    folder, _ = with_tokenizer
    content = json.loads((folder / "tokenizer.json").read_text())
    words = [f"\u2581{word}" for word in dict.fromkeys(WORDS.split())]
    vocabulary = {word: index for index, word in enumerate([*words, *(f"\u2581w{index}" for index in range(300))])}
    content["model"] = {"type": "WordLevel", "vocab": dict(list(vocabulary.items())[:304]), "unk_token": words[0]}
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    content["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert sample(folder, "the quick brown", num_tokens=2, threads=1, device="cpu").startswith(" ")
