"""Evaluation block by block: log-likelihoods, choices, comparisons and samples agree with those of transformers on the whole model."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cbqstream import evaluate
from cbqstream.calibration.segments import load_segments
from cbqstream.errors import InputError, UsageError
from cbqstream.evaluation.against import compare
from cbqstream.evaluation.choices import evaluate_choices, read_questions
from cbqstream.evaluation.likelihood import Request, log_likelihoods
from cbqstream.evaluation.model import EvaluatedModel, open_model
from cbqstream.evaluation.sample import sample
from cbqstream.records import Compute
from cbqstream.runtime.device import fixed_numerics
from tiny import FAMILIES, SEQ_LEN, SOME_FAMILIES, VOCAB, make_model, save_model, save_tokenizer

CPU = Compute(torch.device("cpu"), torch.float32, 3)
WORDS = "the quick brown fox jumps over the lazy dog and then that other one"


def plain(model, request):
    """Log-likelihood of the scored tokens of a request, computed by transformers for this request alone."""
    with torch.no_grad():
        logs = model(torch.tensor([request.ids]), use_cache=False).logits[0].log_softmax(-1)
    first = len(request.ids) - request.scored
    return sum(logs[place - 1, request.ids[place]].item() for place in range(first, len(request.ids)))


@torch.no_grad()
def is_greedy(model, request):
    """Whether transformers predicts every scored token of a request as the most likely one."""
    first = len(request.ids) - request.scored
    predicted = model(torch.tensor([request.ids]), use_cache=False).logits[0].argmax(-1)[first - 1 : -1]
    return predicted.tolist() == list(request.ids[first:])


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_log_likelihoods_of_requests_of_mixed_lengths_are_those_of_single_requests(tmp_path, family):
    """Requests are padded to common lengths. Padding does not change a result, and results have the order of the requests.

    The last request ends with the most likely token, so its continuation is greedy.
    """
    model = make_model(family)
    folder = save_model(tmp_path / family, family, dtype=torch.float32)
    chance = torch.Generator().manual_seed(0)
    requests = []
    for length in (2, 7, 40, 33, 32, 31, 7, 50):
        ids = torch.randint(0, VOCAB, (length,), generator=chance).tolist()
        requests.append(Request(tuple(ids), max(1, length // 3)))
    with torch.no_grad():
        predicted = model(torch.tensor([requests[1].ids]), use_cache=False).logits[0, -1].argmax().item()
    requests.append(Request((*requests[1].ids, predicted), 1))
    found = log_likelihoods(EvaluatedModel(*open_model(folder), CPU), requests)
    assert [scored.log_likelihood for scored in found] == pytest.approx(
        [plain(model, request) for request in requests], rel=1e-4
    )
    assert [scored.greedy for scored in found] == [is_greedy(model, request) for request in requests]


@pytest.fixture
def with_tokenizer(tmp_path):
    """Folder of a tiny Llama in float32 with a tokenizer, and the tokenizer."""
    folder = save_model(tmp_path / "m", "llama", vocab_size=304, dtype=torch.float32)
    tokenizer = save_tokenizer(folder, [WORDS] * 9)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder, tokenizer


def test_accuracy_on_choices_is_that_of_transformers(with_tokenizer, tmp_path):
    """Accuracy by the log-likelihood of a choice, and by the log-likelihood per character."""
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
def test_a_line_that_is_not_a_question_is_refused(tmp_path, line, message):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}\n' + line)
    with pytest.raises(InputError, match=message):
        read_questions(file)
    assert len(read_questions(file, 1)) == 1


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="contains no questions"):
        read_questions(tmp_path / "empty")


def test_divergence_and_top1_of_two_models_are_those_of_transformers(tmp_path, tokens):
    """Compared with itself, a model has a divergence of 0 and a top1 of 1. Models with different vocabularies are refused."""
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
    with pytest.raises(UsageError, match=r"has 128 tokens, that of .* 96\. Give another reference"):
        compare(other, folders[0], tokens, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_questions": -1}, "num_questions is -1"),
        ({"scratch": Path("/no")}, "no such folder"),
    ],
)
def test_evaluate_choices_refuses_options_that_cannot_work(tmp_path, options, message):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}')
    with pytest.raises(UsageError, match=message):
        evaluate_choices(tmp_path, file, **options)


def test_spaces_at_the_end_of_a_prompt_belong_to_the_choice(with_tokenizer, tmp_path):
    """The answer is the same with a space at the end of the prompt and at the start of the choices."""
    folder, _ = with_tokenizer
    answers = []
    for prompt, choices in (("the quick", [" brown", " lazy", " x"]), ("the quick ", ["brown", "lazy", "x"])):
        file = tmp_path / "questions.jsonl"
        file.write_text(json.dumps({"prompt": prompt, "choices": choices, "answer": 0}))
        answers.append(evaluate_choices(folder, file, threads=1, device="cpu").answers)
    assert answers[0] == answers[1]


def test_a_sample_is_the_greedy_continuation_of_transformers(with_tokenizer):
    folder, tokenizer = with_tokenizer
    ids = tokenizer.encode(WORDS).ids
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = plain.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert sample(folder, WORDS, num_tokens=6, threads=1, device="cpu") == tokenizer.decode(written.tolist())
    with pytest.raises(UsageError, match="the prompt has no tokens"):
        sample(folder, "", threads=1, device="cpu")
    with pytest.raises(UsageError, match="num_tokens is 0"):
        sample(folder, "a", num_tokens=0, threads=1, device="cpu")


def test_a_sample_ends_at_the_end_of_text_token(with_tokenizer):
    """The most likely next token is made the end-of-text token, so the sample is empty."""
    folder, tokenizer = with_tokenizer
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        token = tokenizer.id_to_token(plain(torch.tensor([tokenizer.encode(WORDS).ids])).logits[0, -1].argmax().item())
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, "eos_token": token}))
    assert sample(folder, WORDS, num_tokens=9, threads=1, device="cpu") == ""


def test_log_likelihoods_of_no_requests_are_an_empty_list(tmp_path):
    assert log_likelihoods(EvaluatedModel(*open_model(save_model(tmp_path / "m")), CPU), []) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_maximum_length_is_known_for_every_family(tiny_models, family):
    assert open_model(tiny_models[family])[0].max_length >= 16


def test_a_sample_keeps_its_leading_space(with_tokenizer):
    """The tokenizer, like that of Llama 2, removes the first space of the text that it decodes."""
    folder, _ = with_tokenizer
    content = json.loads((folder / "tokenizer.json").read_text())
    words = [f"\u2581{word}" for word in dict.fromkeys(WORDS.split())]
    vocabulary = {word: index for index, word in enumerate([*words, *(f"\u2581w{index}" for index in range(300))])}
    content["model"] = {"type": "WordLevel", "vocab": dict(list(vocabulary.items())[:304]), "unk_token": words[0]}
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    content["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert sample(folder, "the quick brown", num_tokens=2, threads=1, device="cpu").startswith(" ")


def newer_settings():
    """Set the precision of matrix products as newer programs do; torch then refuses to read its older settings."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def older_settings():
    """Set the precision of matrix products and all other settings to values that evaluation does not use."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("high")
    cuda.matmul.allow_bf16_reduced_precision_reduction = cuda.matmul.allow_fp16_reduced_precision_reduction = True
    cuda.enable_cudnn_sdp(True)
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = True, False, True


def readable(read):
    """Value of a setting of torch, or "unreadable" if newer settings contradict it."""
    try:
        return read()
    except RuntimeError:
        return "unreadable"


def global_state():
    """Global state of torch and of its environment on which numerical results depend, by name."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "threads": torch.get_num_threads(),
        "deterministic mode": torch.get_deterministic_debug_mode(),
        "filling of new tensors": torch.utils.deterministic.fill_uninitialized_memory,
        "matmul precision": readable(torch.get_float32_matmul_precision),
        "TF32 of matmul": readable(lambda: cuda.matmul.allow_tf32),
        "TF32 of cuDNN": readable(lambda: cudnn.allow_tf32),
        "precision of matmul": cuda.matmul.fp32_precision,
        "precision of convolutions": cudnn.conv.fp32_precision,
        "bf16 reductions": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "fp16 reductions": cuda.matmul.allow_fp16_reduced_precision_reduction,
        "attention of cuDNN": cuda.cudnn_sdp_enabled(),
        "deterministic cuDNN": cudnn.deterministic,
        "benchmarks of cuDNN": cudnn.benchmark,
        "workspace of cuBLAS": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


EXPECTED_STATE = {
    "threads": 1,
    "deterministic mode": 2,
    "filling of new tensors": False,
    "matmul precision": "highest",
    "TF32 of matmul": False,
    "TF32 of cuDNN": False,
    "precision of matmul": "ieee",
    "precision of convolutions": "ieee",
    "bf16 reductions": False,
    "fp16 reductions": False,
    "attention of cuDNN": False,
    "deterministic cuDNN": True,
    "benchmarks of cuDNN": False,
    "workspace of cuBLAS": ":4096:8",
}
"""Global state while a model is evaluated with one thread."""


@pytest.mark.parametrize(
    "set_before", [lambda: None, older_settings, newer_settings], ids=["default", "older", "newer"]
)
@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_evaluate_restores_the_global_state_of_torch(tiny_models, tokens, monkeypatch, workspace, set_before):
    """The settings of the program are restored after an evaluation, and after an evaluation that fails."""
    options = {"seq_len": SEQ_LEN, "num_samples": 2, "device": "cpu", "threads": 1}
    during = []
    with fixed_numerics(torch.device("cpu"), 2):  # restores the state that this test changes
        set_before()
        with monkeypatch.context() as environment:
            environment.delenv("CUBLAS_WORKSPACE_CONFIG")
            if workspace is not None:
                environment.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
            before = global_state()
            evaluate(tiny_models["llama"], tokens, listener=lambda text: during.append(global_state()), **options)
            assert global_state() == before

            def fail(text):
                raise ZeroDivisionError(text)

            with pytest.raises(ZeroDivisionError):
                evaluate(tiny_models["llama"], tokens, listener=fail, **options)
            assert global_state() == before
    assert during
    assert all(state == EXPECTED_STATE for state in during)
