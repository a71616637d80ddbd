"""Tasks of lm-eval on the streamed model give the results of lm-eval's own model class `hf`."""

import json

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from cbqstream import quantize
from cbqstream.errors import UsageError
from cbqstream.evaluation.harness import StreamedLM, evaluate_tasks
from tiny import save_model, save_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and then that other one"
TASKS = {
    "own_choices": """
task: own_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "own_text": """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
""",
    "own_writing": """
task: own_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture
def folder(tmp_path):
    """A tiny llama with a tokenizer."""
    made = save_model(tmp_path / "m", "llama", vocab_size=304, dtype=torch.float32)
    save_tokenizer(made, [WORDS] * 9, special_tokens=("<s>", "</s>"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (made / "tokenizer_config.json").write_text(json.dumps(names))
    return made


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Folder of the tasks in `TASKS`. Some of their texts are longer than the 64 positions of the model."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    words, lines = WORDS.split(), []
    for index in range(10):
        choices = [f" {words[index + 2]}", f" {words[index + 3]} dog", " x"]
        text = " ".join(words[index % 4 :] * (1 + 3 * (index % 3)))
        lines.append({"prompt": words[index] if index else "", "choices": choices, "answer": index % 3, "text": text})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    made = tmp_path / "tasks"
    made.mkdir()
    for name, content in TASKS.items():
        (made / f"{name}.yaml").write_text(content.replace("DATA", str(data)))
    return made


def metrics(found):
    """Value of every metric of every task, without standard errors."""
    return {
        f"{task} {name}": value
        for task, results in found["results"].items()
        for name, value in results.items()
        if isinstance(value, float) and "stderr" not in name
    }


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_task_metrics_of_a_quantized_model_equal_those_of_lm_evals_hf_class(make_config, folder, tasks):
    folder = quantize(make_config(model=folder))
    names = ["own_choices", "own_text"]
    found = metrics(evaluate_tasks(folder, ["own_ch*", "own_text"], include_path=tasks, device="cpu", threads=1))
    own = {"pretrained": str(folder), "dtype": "float32"}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = lm_eval.simple_evaluate(
        "hf", model_args=own, tasks=names, task_manager=manager, device="cpu", batch_size=1, bootstrap_iters=0
    )
    assert len(found) == 4
    assert found == pytest.approx(metrics(expected), rel=1e-3)


def test_log_likelihoods_equal_those_of_lm_evals_hf_class(folder):
    """The scores of single requests, and whether the continuation is the most likely one. A text may be longer than the model."""
    texts = [("the quick", " brown"), ("", "the lazy dog"), ("over ", "the"), (WORDS * 4, " dog"), ("a", WORDS * 9)]
    requests = [Instance("loglikelihood", {}, text, index) for index, text in enumerate(texts)]
    streamed = StreamedLM(str(folder), device="cpu", threads=1)
    own = lm_eval.api.registry.get_model("hf")(str(folder), dtype="float32", device="cpu", batch_size=1)
    assert (streamed.max_length, streamed.prefix_token_id) == (own.max_length, own.prefix_token_id)
    likeliest = own._model_call(torch.tensor([own.tok_encode("the quick")])).argmax(-1)[0, -1].item()
    requests.append(Instance("loglikelihood", {}, ("the quick", own.tokenizer.decode([likeliest])), 5))
    with pytest.raises(AssertionError):  # lm-eval refuses a text longer than the model; streamed, its end is scored
        own.loglikelihood(requests[4:5])
    found, expected = streamed.loglikelihood(requests), own.loglikelihood([*requests[:4], requests[5]])
    assert [score for score, _ in [*found[:4], found[5]]] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in [*found[:4], found[5]]] == [greedy for _, greedy in expected]


def test_tasks_that_generate_text_are_refused(folder, tasks):
    """By the model class when lm-eval calls it, and by `evaluate_tasks` before it runs the other tasks."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"model_args": {"model": str(folder), "threads": 1}, "task_manager": manager, "device": "cpu"}
    assert lm_eval.api.registry.get_model("cbqstream") is StreamedLM
    with pytest.raises(UsageError, match=r"10 requests generate text, for which each token"):
        lm_eval.simple_evaluate("cbqstream", tasks=["own_writing"], **options)
    with pytest.raises(UsageError, match=r"^own_writing generate text, for which .* Leave them out"):
        evaluate_tasks(folder, ["own_text", "own_writing"], include_path=tasks, device="cpu", threads=1)


def test_unknown_tasks_and_impossible_options_are_refused(folder, tasks):
    for options, message in (
        ({"limit": 0}, "limit is 0"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"include_path": tasks / "none"}, "no such folder"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate_tasks(folder, ["own_text"], device="cpu", threads=1, **options)
    with pytest.raises(UsageError, match=r"lm-eval has no task nonsense\. `lm-eval ls tasks` lists them"):
        evaluate_tasks(folder, ["own_text", "nonsense"], include_path=tasks, device="cpu", threads=1)


def test_a_tokenizer_without_special_tokens_is_refused(folder):
    """Texts without context need a token that precedes them."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UsageError, match=r"Set eos_token in tokenizer_config\.json"):
        _ = StreamedLM(str(folder), device="cpu", threads=1).prefix_token_id
