"""The run directory: records that are sealed and chained, the journal that writes them, and the identity of a run."""

import json
from dataclasses import replace

import pytest

from cbqstream.config import CalibrationConfig, QuantizeConfig
from cbqstream.disk import Disk, digest_of_file
from cbqstream.errors import IdentityError, InputError, StoppedError, UsageError
from cbqstream.records import Costs, EpochReport, Numerics, WindowReport, report_from_dict
from cbqstream.rundir.chain import WINDOW_STATE, Chain, numbered
from cbqstream.rundir.identity import FORMAT, Identity, canonical, require_same
from cbqstream.rundir.journal import discard, open_journal
from cbqstream.rundir.records import Commit, RunRecord, is_sealed, sealed
from cbqstream.scheme import Scheme

NUMERICS = Numerics("cpu", "x86_64", "AVX2", 1, "2.13.0", "5.24.0")
CONFIG = QuantizeConfig(
    model="MODEL", out="OUT", scheme=Scheme.named("W4A16"), calibration=CalibrationConfig(dataset="TEXT")
)
IDENTITY = Identity.of(CONFIG, model={"model_type": "llama"}, weights="w" * 64, tokens="t" * 64, numerics=NUMERICS)
RUN = RunRecord("0.1.0", IDENTITY, CONFIG, windows=4, epochs=1, stream=(4, 16, 64))


def window_report(index, **changes):
    report = WindowReport(
        index=index,
        num_windows=4,
        start=index,
        stop=index + 2,
        loss_before=0.5,
        loss_after=0.25,
        reverted=None,
        changed=0.125,
        sqnr_db={f"model.layers.{index}.mlp.up_proj": 20.5},
        experts={f"model.layers.{index}.mlp.experts": (3, 4)},
        smoothed={f"model.layers.{index}.input_layernorm": (2, 4.0)},
        undersampled=(f"model.layers.{index}.mlp.experts.0.up_proj",),
        costs=Costs(1.5, 1 << 30, 0.25, 0.125),
    )
    return replace(report, **changes)


def commit_window(journal, **changes):
    """Commit a window with one shard, and a window state unless it is the last one."""
    window = journal.chain.next_window
    journal.empty_tmp()
    journal.new_folder("parts")
    journal.new_folder("acts")
    parts = {}
    for name in (f"block-{window:05d}.safetensors", *([WINDOW_STATE] if window < 3 else [])):
        parts[name] = journal.disk.write(journal.building / "parts" / name, [f"{name} of {window}".encode()])
    report = window_report(window) if window < 4 else EpochReport(window - 4, 1, 0.5, 0.25, Costs(1.0, 1))
    acts = {"reference": [[4, 1]], "quantized": [[4, 2]]} if window < 3 else None
    values = {"parts": parts, "acts": acts, "source": {f"tensor.{window}": "s" * 64}, "numerics": NUMERICS}
    journal.commit(**{**values, "report": report, **changes})


@pytest.fixture
def run(tmp_path):
    """A run directory with three of four windows committed."""
    path = tmp_path / "run"
    with open_journal(path, Disk(), RUN) as journal:
        for _ in range(3):
            commit_window(journal)
    return path


def rewrite(file, change, *, seal=True):
    """Change a record; with a seal that fits the new content, or with the old seal."""
    values = json.loads(file.read_bytes())
    change(values)
    if seal:
        values.pop("self")
        values = sealed(values)
    file.write_bytes(canonical(values))


@pytest.mark.parametrize("report", [window_report(2), window_report(1, costs=None, experts={}, undersampled=())])
def test_window_reports_survive_json(report):
    restored = report_from_dict(json.loads(json.dumps(report.to_dict())))
    assert restored == replace(report, experts={path: tuple(counts) for path, counts in report.experts.items()})


def test_epoch_reports_survive_json():
    report = EpochReport(1, 2, 0.5, 0.25, Costs(1.0, 5, peak_vram=7))
    assert report_from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", "3"),
        ("blocks", [1]),
        ("loss_after", None),
        ("changed", True),
        ("sqnr_db", {"a": "20"}),
        ("smoothed", {"a": [1]}),
        ("undersampled", [3]),
        ("costs", {"seconds": 1.0}),
        ("costs", {"seconds": 1.0, "peak_rss": 1, "unknown": 2}),
    ],
)
def test_a_report_with_a_wrong_field_is_refused(name, value):
    with pytest.raises(ValueError, match=r"window|blocks|number|text|costs|unpack|missing"):
        report_from_dict(window_report(0).to_dict() | {name: value})


@pytest.mark.parametrize("name", ["blocks", "loss_before", "reverted", "sqnr_db"])
def test_a_report_without_a_field_is_refused(name):
    values = window_report(0).to_dict()
    values.pop(name)
    with pytest.raises(ValueError, match=name):
        report_from_dict(values)


def test_records_are_sealed_and_read_back():
    assert is_sealed(RUN.to_dict())
    assert RunRecord.from_dict(json.loads(canonical(RUN.to_dict()))) == RUN
    commit = Commit(
        window=0, prev=RUN.digest, parts={}, acts=None, source={}, numerics=NUMERICS, report=window_report(0)
    )
    assert is_sealed(commit.to_dict())
    restored = Commit.from_dict(json.loads(canonical(commit.to_dict())))
    assert restored.digest == commit.digest == commit.to_dict()["self"]


def test_the_chain_of_a_run(run):
    chain = Chain.read(run)
    assert (chain.next_window, chain.num_windows, chain.num_commits, chain.is_complete) == (3, 4, 5, False)
    assert [commit.prev for commit in chain.commits] == [RUN.digest, *(commit.digest for commit in chain.commits[:2])]
    assert chain.source_digests == {f"tensor.{window}": "s" * 64 for window in range(3)}
    assert [path.name for path in chain.shards()] == [f"block-{window:05d}.safetensors" for window in range(3)]
    assert chain.parts(2) / WINDOW_STATE in chain.expected_parts()
    assert chain.parts(1) / WINDOW_STATE not in chain.expected_parts()
    assert [report.index for report in chain.window_reports] == [0, 1, 2]
    assert chain.epoch_reports == []
    assert chain.committed_acts == {"reference": [[4, 1]], "quantized": [[4, 2]]}
    assert chain.acts_to_keep() == {numbered(3)}


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize("name", ["run.json", "commits/00000", "commits/00002"])
def test_a_changed_record_breaks_the_chain(run, name, seal):
    """A record with a new seal breaks the chain too, unless it is the newest one."""
    rewrite(run / name, lambda values: values.update(window=9, windows=9), seal=seal)
    if seal and name == "commits/00002":
        with pytest.raises(InputError, match="not known"):
            Chain.read(run)
    else:
        with pytest.raises(InputError, match=r"checksum|not known"):
            Chain.read(run)


@pytest.mark.parametrize("missing", ["identity", "config", "stream"])
def test_a_run_record_without_a_field_is_refused(run, missing):
    rewrite(run / "run.json", lambda values: values.pop(missing))
    with pytest.raises(InputError, match="record of a run"):
        Chain.read(run)


def test_a_missing_commit_breaks_the_chain(run):
    (run / "commits" / "00001").unlink()
    with pytest.raises(InputError, match="place in the chain"):
        Chain.read(run)


@pytest.mark.parametrize(("other", "age"), [(FORMAT - 1, "an older"), (FORMAT + 1, "a newer")])
def test_other_formats_are_refused_by_name(run, other, age):
    rewrite(run / "run.json", lambda values: values["identity"].update(format=other))
    with pytest.raises(IdentityError, match=f"run format {other} of {age} version"):
        Chain.read(run)


def test_files_of_parts_are_checked(run):
    chain = Chain.read(run)
    chain.require_parts()
    file = chain.shards()[1]
    chain.require_intact(file)
    content = file.read_bytes()
    file.write_bytes(content[::-1])
    chain.require_parts()
    with pytest.raises(InputError, match="SHA-256 does not match"):
        chain.require_intact(file)
    file.write_bytes(content[:-1])
    with pytest.raises(InputError, match="were committed"):
        chain.require_parts()
    file.unlink()
    with pytest.raises(InputError, match="missing"):
        chain.require_parts()


def test_a_result_is_recognized_by_its_shards(run, tmp_path):
    chain, out = Chain.read(run), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert not chain.is_result(out)
    for shard in chain.shards():
        (out / shard.name).write_bytes(shard.read_bytes())
    assert chain.is_result(out)
    copy = out / chain.shards()[0].name
    copy.write_bytes(copy.read_bytes()[::-1])
    assert not chain.is_result(out)
    assert chain.is_result(out, read=False)  # the size is still the same


def test_the_journal_finishes_a_run(run):
    with open_journal(run, Disk()) as journal:
        commit_window(journal)
        commit_window(journal)
        assert journal.chain.is_complete
        assert not (run / "acts" / numbered(4)).exists()
    chain = Chain.read(run)
    assert [epoch.epoch for epoch in chain.epoch_reports] == [0]
    assert chain.last == chain.commits[-1].digest


def test_only_two_window_states_are_kept(run):
    kept = [window for window in range(3) if (run / "parts" / numbered(window) / WINDOW_STATE).exists()]
    assert kept == [1, 2]
    with open_journal(run, Disk()) as journal:
        journal.clean()
    assert not (run / "parts" / "00000" / WINDOW_STATE).exists()
    assert (run / "parts" / "00001" / WINDOW_STATE).exists()


def test_a_rollback_deletes_the_newest_window(run):
    with open_journal(run, Disk()) as journal:
        journal.roll_back(2)
        assert journal.chain.next_window == 2
        commit_window(journal)
    assert Chain.read(run).next_window == 3


@pytest.mark.parametrize(("to", "match"), [(3, "must be smaller"), (-1, "must be smaller"), (1, "no longer kept")])
def test_an_impossible_rollback_is_refused(run, to, match):
    with open_journal(run, Disk()) as journal, pytest.raises(UsageError, match=match):
        journal.roll_back(to)
    assert Chain.read(run).next_window == 3


def test_what_no_commit_names_is_deleted(run):
    for place in ("parts/00007", "acts/00001", "tmp/rest"):
        (run / place).mkdir()
    with open_journal(run, Disk()):
        assert sorted(path.name for path in (run / "parts").iterdir()) == ["00000", "00001", "00002"]
        assert not list((run / "tmp").iterdir())
        assert not (run / "acts" / "00001").exists()


def test_a_file_that_is_not_of_a_run_is_left_alone(run):
    (run / "parts" / "mine").mkdir()
    with pytest.raises(InputError, match="does not belong in a run directory"), open_journal(run, Disk()):
        pass
    assert (run / "parts" / "mine").exists()


def test_a_second_process_is_refused(run):
    with open_journal(run, Disk()), pytest.raises(StoppedError, match="another process"), open_journal(run, Disk()):
        pass


def test_a_commit_with_a_file_of_another_size_is_refused(run, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"longer than what was written, by far")
    with open_journal(run, Disk()) as journal, pytest.raises(InputError, match="bytes after writing"):
        commit_window(journal, parts={"block-00003.safetensors": digest_of_file(other)})
    assert Chain.read(run).next_window == 3


def test_discarding_a_run_leaves_nothing(run):
    discard(run, Disk())
    assert not run.exists()
    assert not list(run.parent.glob("run*"))


def test_a_run_with_a_file_of_somebody_else_is_not_discarded(run):
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="does not belong to the run"):
        discard(run, Disk())
    assert (run / "notes.txt").exists()


def test_a_run_directory_that_others_can_change_is_refused(run):
    run.chmod(0o777)
    with pytest.raises(IdentityError, match="others can write"), open_journal(run, Disk()):
        pass
    with open_journal(run, Disk(), shared=True) as journal:
        assert journal.chain.next_window == 3


def test_the_identity_ignores_paths_and_limits(tmp_path):
    moved = replace(
        CONFIG,
        model="elsewhere",
        out="OTHER",
        run_dir="RUN",
        max_ram=1 << 30,
        device="cpu",
        calibration=replace(CONFIG.calibration, dataset="copy"),
    )
    other = Identity.of(moved, model={"model_type": "llama"}, weights="w" * 64, tokens="t" * 64, numerics=NUMERICS)
    require_same(tmp_path, IDENTITY, other)
    assert Identity.from_dict(json.loads(canonical(IDENTITY.to_dict()))) == IDENTITY


def test_a_changed_identity_is_refused_with_both_values(tmp_path):
    other = Identity.of(
        replace(CONFIG, seed=7), model={"model_type": "llama"}, weights="x" * 64, tokens="t" * 64, numerics=NUMERICS
    )
    with pytest.raises(IdentityError, match=r"settings\.seed: 0 -> 7; source\.weights: \"w+\" -> \"x+\""):
        require_same(tmp_path, IDENTITY, other)


def test_changed_numerics_alone_can_be_allowed(tmp_path):
    changed = replace(NUMERICS, threads=2, torch="2.14.0")
    with pytest.raises(IdentityError, match="--allow-numerics-change"):
        require_same(tmp_path, IDENTITY, IDENTITY.with_numerics(changed))
    assert NUMERICS.changes_to(changed) == "threads 1 -> 2, torch 2.13.0 -> 2.14.0"
