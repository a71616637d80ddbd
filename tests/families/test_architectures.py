"""The sweep over all architectures of transformers, for some types, and its table."""

import json

import numpy as np
import pytest

from cbqstream.errors import InputError
from families import page


def test_llama_and_mixtral_are_right(tool, tmp_path):
    for name in ("llama", "mixtral"):
        found = tool.try_type(name, tmp_path / name)
        assert (found["outcome"], found["failures"]) == ("right", [])
        assert found["difference"] < 1e-5
        assert found["quantized"] > 0.99


def test_other_logits_are_wrong(tool, tmp_path, monkeypatch):
    """A model that is there is not made again, so its reference logits can be changed."""
    tool.make_model("llama", tmp_path / "llama")
    reference = np.load(tmp_path / "llama" / "reference.npy")
    reference[1, 5] += 0.01 * reference.max()
    np.save(tmp_path / "llama" / "reference.npy", reference)
    monkeypatch.setattr(tool, "quantize_model", lambda folder: None)
    found = tool.try_type("llama", tmp_path / "llama")
    assert found["outcome"] == "wrong"
    assert found["difference"] == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("error", "made", "outcome"),
    [
        (InputError("source", "is broken."), "", "refused"),
        (InputError("source", "is broken."), "out.run", "refused late"),
        (InputError("source", "is broken."), "out", "refused late"),
        (ZeroDivisionError("division by zero"), "", "traceback"),
    ],
)
def test_an_error_is_refused_only_if_it_is_on_purpose_and_nothing_was_written(tool, tmp_path, error, made, outcome):
    def step(folder):
        (folder / made).mkdir(exist_ok=True)
        raise error

    trial = tool.Trial(tmp_path)
    trial.run("quantize", step)
    assert [(found, stage) for found, stage, _ in trial.failures] == [(outcome, "quantize")]


def test_the_table_has_the_outcomes_of_all_types(tool, tmp_path, monkeypatch):
    """The text around the table is kept."""
    results, target = tmp_path / "results.jsonl", tmp_path / "page.md"
    records = list(tool.sweep(["gpt2", "pix2struct"], tmp_path / "models", jobs=2, timeout=120))
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    target.write_text("before\n<!-- architectures -->\nold\n<!-- end of architectures -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["page.py", str(results), "5.24.0", str(target)])
    page.main()
    lines = target.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "old" not in lines
    assert "2 architectures: 0 right, 1 refused, 1 not buildable, 0 wrong, 0 traceback" in "\n".join(lines)
    rows = {line.split(" | ")[0]: line for line in lines if line.startswith("| ")}
    assert "| gpt2 | refused |" in rows["| gpt2"]
    assert "have no linear layers" in rows["| gpt2"]
    assert "| pix2struct | not buildable |" in rows["| pix2struct"]
