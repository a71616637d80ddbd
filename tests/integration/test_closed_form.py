"""The rounding method gptq on whole tiny models: losses, experts, offloading, resuming, and what is refused."""

from pathlib import Path

import pytest
import torch

from cbqstream import quantize
from cbqstream.config import WindowConfig
from cbqstream.errors import StoppedError, UsageError
from cbqstream.numerics import gptq
from cbqstream.records import RunWarning, WindowReport
from cbqstream.rounding.gptq import Gptq
from cbqstream.scheme import Scheme
from cbqstream.windows import closed_form
from cbqstream.windows.stage_inputs import StageInputs
from killing import KilledError, windows_committed
from tiny import SEQ_LEN, files_of, save_tokens

ONE_BLOCK = WindowConfig(size=1, overlap=0)


@pytest.fixture
def make_gptq(make_config, tmp_path):
    """`make_config` with the rounding gptq, windows of one block, and 64 segments."""

    tokens = save_tokens(tmp_path / "tokens.npy", 64 * SEQ_LEN)

    def make(family="llama", **options):
        options = {"dataset": tokens, "num_samples": 64, **options}
        reconstruction = {"rounding": "gptq", **options.pop("reconstruction", {})}
        return make_config(family, window=ONE_BLOCK, reconstruction=reconstruction, **options)

    return make


def reports_of(config, **options):
    """Reports and warnings of a run."""
    events = []
    quantize(config, events.append, **options)
    return [event for event in events if isinstance(event, WindowReport)], [
        event.text for event in events if isinstance(event, RunWarning)
    ]


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(num_bits=3, group_size=16, symmetric=False),
        Scheme(num_bits=4, group_size=None, symmetric=True),
        Scheme(num_bits=4, group_size=32, activation_bits=8, activation_strategy="tensor"),
    ],
    ids=str,
)
def test_gptq_lowers_the_loss_on_held_out_segments(make_gptq, scheme):
    reports, _ = reports_of(make_gptq(scheme=scheme))
    assert [(report.start, report.stop) for report in reports] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert reports[0].reverted is None
    assert reports[0].loss_after < 0.9 * reports[0].loss_before
    assert sum(report.loss_after for report in reports) < 0.95 * sum(report.loss_before for report in reports)
    assert all(report.changed > 0.02 for report in reports if report.reverted is None)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "falcon"])
def test_gptq_quantizes_mixtures_and_parallel_blocks(make_gptq, family):
    """Experts with few tokens are rounded with the inputs of all experts, and a warning names them."""
    reports, warnings = reports_of(make_gptq(family, scheme=Scheme(num_bits=3, group_size=16)))
    assert sum(report.loss_after for report in reports) < 0.97 * sum(report.loss_before for report in reports)
    undersampled = [name for report in reports for name in report.undersampled]
    assert bool(undersampled) == any("rounded with the inputs of all experts" in text for text in warnings)
    assert not any("rounded to nearest" in text for text in warnings)


STAGES = {
    "llama": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "mixtral": ["q_proj k_proj v_proj", "o_proj", "up_proj gate_proj", "down_proj"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi": ["q_proj k_proj v_proj fc1", "dense", "fc2"],
}


@pytest.mark.parametrize("family", STAGES)
def test_layers_that_read_the_same_input_are_a_stage(make_gptq, monkeypatch, family):
    """All experts of a block are in the same stage."""
    found = []

    def stages(self, real=StageInputs.stages):
        found.append(real(self))
        return found[-1]

    monkeypatch.setattr(StageInputs, "stages", stages)
    with pytest.raises(StoppedError):
        quantize(make_gptq(family), stop_after_window=1)
    (block,) = found
    names = [" ".join(name.rpartition(".")[2] for name in stage[0].layers) for stage in block]
    assert sorted(names) == sorted(STAGES[family])
    assert names[0] == STAGES[family][0]
    assert [len(stage) for stage in block] == [
        4 if family == "mixtral" and ("up" in name or "down" in name) else 1 for name in names
    ]


def test_a_run_killed_between_two_layers_resumes_and_gives_identical_files(make_gptq, monkeypatch):
    whole, config = make_gptq(name="whole"), make_gptq(name="killed")
    quantize(whole)
    calls, real = [], Gptq.assign

    def assign(self, *arguments):
        calls.append(self)
        if len(calls) == 10:  # in the second block
            raise KilledError
        real(self, *arguments)

    monkeypatch.setattr(Gptq, "assign", assign)
    with pytest.raises(KilledError):
        quantize(config)
    assert windows_committed(config.run_path) == 1
    monkeypatch.setattr(Gptq, "assign", real)
    quantize(config)
    assert files_of(Path(config.out)) == files_of(Path(whole.out))


def test_codes_that_increase_the_loss_are_reverted_to_the_nearest(make_gptq, monkeypatch):
    monkeypatch.setattr(closed_form, "gptq_levels", lambda *given: torch.zeros_like(gptq.gptq_levels(*given)))
    reports, _ = reports_of(make_gptq(name="reverted"))
    assert {report.reverted for report in reports} == {"held-out loss increased"}
    nearest = make_gptq(name="nearest", reconstruction={"rounding": "nearest"})
    quantize(nearest)
    parts = [files_of(Path(config.out)) for config in (make_gptq(name="reverted"), nearest)]
    assert all(parts[0][name] == parts[1][name] for name in parts[0] if name.startswith("block-"))


def test_a_damping_that_was_raised_is_told(make_gptq):
    """With fewer tokens than columns, the Gram matrix has no inverse."""
    _, warnings = reports_of(make_gptq(num_samples=2, reconstruction={"damping": 0.0}))
    assert any("the damping was raised to" in text and "down_proj" in text for text in warnings)


def test_windows_of_several_blocks_are_refused(make_config):
    with pytest.raises(UsageError, match="gptq quantizes one block at a time, and the window size is 2"):
        make_config(reconstruction={"rounding": "gptq"})
