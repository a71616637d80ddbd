"""The model card and metrics of a result, and the report of a run."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from cbqstream import quantize
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.commands.report import report
from cbqstream.config import TransformConfig
from cbqstream.errors import InputError, StoppedError, UsageError
from cbqstream.evaluation.model import open_model
from cbqstream.evaluation.perplexity import evaluate
from cbqstream.rundir.chain import Chain
from cbqstream.scheme import Scheme
from tiny import SEQ_LEN, files_of, save_model

CPU = torch.device("cpu")
METADATA = "---\nlicense: apache-2.0\n---\n"


class Page(HTMLParser):
    """Text, tags and references of an HTML page, in which every tag must be closed."""

    def __init__(self, content):
        super().__init__()
        self.open, self.text, self.references, self.tags = [], "", [], []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def with_card(tmp_path):
    """A model with a model card that has metadata."""
    folder = save_model(tmp_path / "m", dtype=torch.float32)
    (folder / "README.md").write_text(f"{METADATA}\n# A model\n\nOf the source.\n")
    return folder


def test_the_model_card_of_a_result_precedes_the_card_of_the_source(make_config, with_card):
    out = quantize(make_config(model=with_card, override=("down_proj=W8",), keep_last=1))
    card = (out / "README.md").read_text()
    assert card.startswith(f"{METADATA}\n# Quantized to W4A16\n")
    assert card.endswith("# A model\n\nOf the source.\n")
    assert "| quantized | blocks 0 to 2, 75.0% of the weights of all blocks |" in card
    assert Chain.read(Path(f"{out}.run")).run.identity.tokens in card
    assert str(out.parent) not in card


def test_the_recipe_in_the_model_card_reproduces_the_result(make_config, with_card, tokens, tmp_path):
    """Settings that are not the defaults give identical files, the card included."""
    transforms = TransformConfig(smoothing="always", smoothing_rule="paper")
    scheme = Scheme(num_bits=3, group_size=None, symmetric=False, activation_bits=8, activation_strategy="tensor")
    learned = {"rounding": "lora_rounding", "target_mix": 0.5, "epochs": 1, "end_to_end_epochs": 1}
    config = make_config(
        model=with_card, scheme=scheme, reconstruction=learned, transforms=transforms, ignore=("layers.1.mlp",), seed=3
    )
    out = quantize(config)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(re.search(r"```toml\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1])
    same = ["--recipe", recipe, "--dataset", tokens, "--device", "cpu", "--threads", config.threads]
    command = [sys.executable, "-m", "cbqstream", "quantize", with_card, tmp_path / "again", *same]
    made = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    assert files_of(tmp_path / "again") == files_of(out)


def test_sqnr_in_the_metrics_is_that_of_the_stored_weights(make_config, with_card):
    out = quantize(make_config(model=with_card))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["window"] for line in lines] == [0, 1, 2]
    assert all(not {"costs", "seconds", "peak_rss"} & line.keys() for line in lines)
    sqnr_db = {path: value for line in lines for path, value in line["sqnr_db"].items()}
    source, (meta_model, result) = Checkpoint.open(with_card), open_model(out)
    assert sqnr_db.keys() == {f"{spec.prefix}.{name}" for spec in meta_model.blocks for name in spec.linears}
    for path, decibels in sqnr_db.items():
        weight = source.read(f"{path}.weight", device=CPU).double()
        lost = weight - result.read(f"{path}.weight", device=CPU).double()
        assert decibels == pytest.approx(10 * (weight.square().sum() / lost.square().sum()).log10().item(), rel=1e-6)


def test_reports_of_an_unfinished_run_a_finished_run_and_a_result(make_config, with_card, tokens, tmp_path):
    """The page is self-contained and has every figure. The report of a result has no figures of time and memory."""
    config = make_config(
        model=with_card,
        scheme=Scheme(num_bits=4, group_size=32),
        transforms=TransformConfig(smoothing="always", smoothing_rule="search"),
        reconstruction={"end_to_end_epochs": 1},
    )
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=1)
    run = Path(f"{config.out}.run")
    unfinished = Page(report(run, tmp_path / "unfinished").read_text())
    assert "1 of 3 done" in unfinished.text
    out = quantize(config)
    options = {"num_samples": 8, "seq_len": SEQ_LEN, "device": "cpu", "threads": 1}
    made = report(run, tmp_path / "report", tokens, **options)
    pictures = {"loss.png", "sqnr.png", "changed.png", "smoothed.png", "epochs.png", "time.png", "memory.png"}
    assert {path.name for path in made.parent.iterdir()} == pictures | {"report.html"}
    assert all((made.parent / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    shown = Page(made.read_text())
    assert shown.tags.count("svg") == len(pictures)
    assert all(reference.startswith(("#", "data:")) for reference in shown.references)
    assert "#010203" not in made.read_text()
    assert "mathdefault" not in made.read_text()  # TeX markup of powers of ten, which no browser renders
    for name, folder in (("source", with_card), ("result", out)):
        assert f"perplexity, {name}{evaluate(folder, tokens, **options).perplexity:.3f}" in shown.text
    # a scale for 32 codes is stored in the dtype of the source, 32 bits
    assert "bits per weight5.000 of 147,456 quantized weights" in shown.text
    of_result = Page(report(out, tmp_path / "of-result").read_text())
    assert of_result.tags.count("svg") == len(pictures) - 2  # metrics.jsonl has no costs
    assert "3 of 3 done" in of_result.text


def test_a_report_escapes_names_and_can_be_written_into_the_current_folder(
    make_config, with_card, tmp_path, monkeypatch
):
    """Names of layers are neither HTML nor mathematical notation."""
    out = quantize(make_config(model=with_card, reconstruction={"rounding": "nearest"}))
    lines = (out / "metrics.jsonl").read_text().replace("mlp.up_proj", "</text>$x_{$ <script>")
    (out / "metrics.jsonl").write_text(lines)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = report(out, Path())
    assert "script" not in Page(made.read_text()).tags


def test_the_seconds_of_reading_and_of_writing_do_not_exceed_those_of_the_window(make_config, with_card):
    """Only time for which the run waits is counted, not that of reading and writing in the background."""
    config = make_config(model=with_card)
    quantize(config)
    for commit in Chain.read(Path(f"{config.out}.run")).commits:
        costs = commit.report.costs
        assert costs is not None
        assert 0 <= costs.writing <= costs.seconds
        assert 0 <= costs.reading <= costs.seconds


@pytest.mark.parametrize(
    ("original", "metadata", "text"),
    [
        ("", "", ""),
        ("# Plain\n", "", "# Plain\n"),
        ("---\nlicense: mit\n---", "---\nlicense: mit\n---\n\n", ""),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n\r\n# A\r\n", "---\nlicense: mit\n---\n\n", "# A\n"),
        ("---\nno end\n# A\n", "", "---\nno end\n# A\n"),
        ("------\n# A\n---\n", "", "------\n# A\n---\n"),
    ],
)
def test_metadata_for_the_hub_stays_at_the_start_of_the_model_card(make_config, with_card, original, metadata, text):
    (with_card / "README.md").write_bytes(original.encode())
    out = quantize(make_config(model=with_card, keep_last=3, reconstruction={"rounding": "nearest"}))
    card = (out / "README.md").read_bytes().decode()
    assert card.startswith(f"{metadata}# Quantized to W4A16\n")
    assert card.endswith(f"```\n\n{text}" if text else "```\n")


def test_reports_into_occupied_folders_or_of_damaged_results_are_refused(make_config, with_card, tmp_path):
    out = quantize(make_config(model=with_card, reconstruction={"rounding": "nearest"}))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UsageError, match=r"exists and is not empty"):
        report(out, tmp_path / "taken")
    with pytest.raises(UsageError, match=r"no such folder"):
        report(out, tmp_path / "none" / "report")
    with pytest.raises(InputError, match=r"neither a run directory"):
        report(tmp_path, tmp_path / "report")
    with pytest.raises(InputError, match=r"the model is not quantized"):
        report(with_card, tmp_path / "report")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    for damaged in (
        "{",
        "[]",
        '{"window": 0, "loss": 1.0}',
        json.dumps({**first, "blocks": [1]}),
        json.dumps({**first, "sqnr_db": {"lm_head": 3.0}}),
        json.dumps({**first, "changed": "much"}),
    ):
        (out / "metrics.jsonl").write_text(damaged)
        with pytest.raises(InputError, match=r"metrics\.jsonl: not a file that quantize wrote"):
            report(out, tmp_path / "report")
    (out / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl: missing\. Give the run directory"):
        report(out, tmp_path / "report")
    assert not list(tmp_path.glob("report*"))
