"""Stopped runs resume and give the files of a run that was not stopped; changed inputs and foreign folders are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cbqstream import quantize
from cbqstream.config import QuantizeConfig, TransformConfig
from cbqstream.disk import Disk
from cbqstream.errors import IdentityError, InputError, StoppedError, UsageError
from cbqstream.records import WindowReport
from cbqstream.rundir.journal import open_journal
from cbqstream.scheme import Scheme
from killing import KilledError, quantize_until, windows_committed
from tiny import files_of, save_model


def windows_done(config, **options):
    """Quantize, and return the numbers of the windows that were done."""
    reports = []
    quantize(config, lambda event: reports.append(event) if isinstance(event, WindowReport) else None, **options)
    return [report.index for report in reports]


def test_a_process_killed_in_its_second_window_resumes_and_gives_identical_files(make_config):
    """The process gets SIGKILL at a time that does not depend on its operations."""
    whole = make_config(name="whole", reconstruction={"epochs": 30})
    quantize(whole)
    config = make_config(name="killed", reconstruction={"epochs": 30})
    program = textwrap.dedent(
        """
        import json, sys
        import torch
        torch.set_num_threads(1)
        from cbqstream import QuantizeConfig, quantize
        quantize(QuantizeConfig.from_dict(json.loads(sys.argv[1])), lambda event: print(event, flush=True))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(config.to_dict())], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "window 2/3" in line and "reconstruction" in line:
            time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert windows_committed(config.run_path) == 1
    assert windows_done(config) == [1, 2]
    assert files_of(Path(config.out)) == files_of(Path(whole.out))


def flip(path):
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def stop_after_the_first_commit(config):
    """Simulate a kill after the first commit, before its streams are deleted."""
    first = config.run_path / "commits" / "00000"
    quantize_until(
        config, lambda _, name, path: name == "remove_tree" and path.parent.name == "acts" and first.exists()
    )
    assert windows_committed(config.run_path) == 1


LOSSES = {
    "all": lambda acts: shutil.rmtree(acts),
    "a stream": lambda acts: shutil.rmtree(acts / "quantized"),
    "a chunk": lambda acts: (acts / "reference" / "c.3.0.0").unlink(),
    "a bit": lambda acts: flip(acts / "quantized" / "c.2.0.0"),
    "the metadata": lambda acts: (acts / "quantized" / "zarr.json").write_text("{"),
    "an end": lambda acts: os.truncate(acts / "reference" / "c.0.0.0", 7),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_missing_or_damaged_streams_are_recomputed(make_config, loss):
    """The source and the finished blocks are enough to recompute them, and the result is identical."""
    options = {"keep_first": 1, "scheme": Scheme(num_bits=4, group_size=32, activation_bits=8)}
    whole, config = make_config(name="whole", **options), make_config(name="lost", **options)
    quantize(whole)

    stop_after_the_first_commit(config)
    LOSSES[loss](config.run_path / "acts" / "00001")
    assert windows_done(config) == [1]
    assert files_of(Path(config.out)) == files_of(Path(whole.out))


def test_recomputed_streams_that_differ_from_the_committed_ones_are_refused(make_config):
    """They differ if a finished block was changed on disk."""
    config = make_config()
    stop_after_the_first_commit(config)
    shutil.rmtree(config.run_path / "acts" / "00001")
    flip(config.run_path / "parts" / "00000" / "block-00000.safetensors")
    with pytest.raises(InputError, match="the recomputed streams are not what was committed"):
        quantize(config)
    assert windows_committed(config.run_path) == 1


def test_shards_and_window_states_of_a_killed_run_are_identical_to_those_of_a_whole_run(make_config):
    whole, config = make_config(name="whole"), make_config(name="stopped")
    states: dict[str, list[bytes]] = {"whole": [], "stopped": []}
    commits = 0

    def watch(name, path, kind):
        if name == "remove_file":
            states[kind].append(path.read_bytes())

    def die(number, name, path):
        nonlocal commits
        watch(name, path, "stopped")
        if name == "rename" and path.parent.name == "commits":
            commits += 1
            if commits == 2:
                raise KilledError

    quantize(whole, disk=Disk(lambda number, name, path: watch(name, path, "whole")))
    with pytest.raises(KilledError):
        quantize(config, disk=Disk(die))
    quantize(config, disk=Disk(lambda number, name, path: watch(name, path, "stopped")))
    assert files_of(whole.run_path / "parts") == files_of(config.run_path / "parts")
    assert len(states["whole"]) == 1
    assert states["whole"] == states["stopped"]


@pytest.mark.parametrize("rounding", ["signround", "lora_rounding"])
def test_a_resumed_run_continues_smoothing_and_truncation(with_outliers, make_config, rounding):
    """A run that stops in its second window and resumes gives the files of a whole run."""
    options = {
        "model": with_outliers("llama"),
        "scheme": Scheme(num_bits=4, group_size=16, activation_bits=8, activation_strategy="tensor"),
        "transforms": TransformConfig(truncate_weights=True, smoothing="always", smoothing_rule="paper"),
        "reconstruction": {"rounding": rounding, "kl_weight": 0.1, "robust_tokens": 1, "schedule": "cosine"},
    }
    whole, config = make_config(name="whole", **options), make_config(name="stopped", **options)
    quantize(whole)
    with pytest.raises(KilledError):
        quantize(config, listener=die_in_window(2))
    assert windows_committed(config.run_path) == 1
    assert windows_done(config) == [1, 2]
    assert files_of(Path(config.out)) == files_of(Path(whole.out))


def die_in_window(number):
    """A listener that simulates a kill when window `number`, counted from 1, begins its reconstruction."""

    def listen(event):
        if isinstance(event, str) and f"window {number}/" in event and "reconstruction" in event:
            raise KilledError

    return listen


def test_quantizing_a_finished_run_again_changes_no_file(make_config):
    config = make_config()
    quantize(config)
    before = {path.name: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}
    assert windows_done(config) == []
    assert {path.name: path.stat().st_mtime_ns for path in Path(config.out).iterdir()} == before


def test_a_deleted_result_is_written_again_from_the_run_directory(make_config):
    config = make_config()
    quantize(config)
    expected = files_of(Path(config.out))
    shutil.rmtree(config.out)
    assert windows_done(config) == []
    assert files_of(Path(config.out)) == expected


CHANGES = {
    "settings.seed": lambda values: values | {"seed": 1},
    "settings.scheme.num_bits": lambda values: (
        values | {"scheme": {"num_bits": 3, "group_size": 32, "symmetric": True}}
    ),
    "settings.reconstruction.epochs": lambda values: (
        values | {"reconstruction": values["reconstruction"] | {"epochs": 3}}
    ),
    "settings.window.overlap": lambda values: values | {"window": {"size": 2, "overlap": 0}},
    "calibration.tokens": lambda values: values | {"calibration": values["calibration"] | {"num_samples": 12}},
    "numerics.threads": lambda values: values | {"threads": 2},
}


@pytest.mark.parametrize("field", CHANGES)
def test_changed_settings_are_refused_with_the_name_of_the_setting(make_config, field):
    """So are other calibration tokens and another number of threads. The message gives the old and the new value."""
    config = make_config(reconstruction={"epochs": 1})
    quantize(config)
    before = files_of(config.run_path)
    with pytest.raises(IdentityError, match=rf"{field}[^;]*: .* -> "):
        quantize(QuantizeConfig.from_dict(CHANGES[field](config.to_dict())))
    assert files_of(config.run_path) == before


def test_resuming_with_a_source_of_another_architecture_is_refused(make_config, tiny_models):
    config = make_config()
    quantize(config)
    with pytest.raises(IdentityError, match=r"source\.config"):
        quantize(QuantizeConfig.from_dict({**config.to_dict(), "model": str(tiny_models["mistral"])}))


def test_resuming_after_the_weights_of_the_source_changed_is_refused(make_config, tmp_path):
    """Otherwise blocks of two models would be mixed, for instance if a fine-tuned model was overwritten by the next one."""
    config = make_config(model=save_model(tmp_path / "model"))
    quantize(config)
    shutil.rmtree(config.model)
    save_model(Path(config.model), seed=7)
    with pytest.raises(IdentityError, match=r"source\.weights"):
        quantize(config)


def test_a_moved_run_directory_can_be_resumed_with_another_output(make_config, tmp_path):
    config = make_config()
    quantize(config)
    expected = files_of(Path(config.out))
    config.run_path.rename(tmp_path / "elsewhere.run")
    moved = QuantizeConfig.from_dict(
        {**config.to_dict(), "run_dir": str(tmp_path / "elsewhere.run"), "out": str(tmp_path / "elsewhere")}
    )
    assert windows_done(moved) == []
    assert files_of(tmp_path / "elsewhere") == expected


def test_a_run_that_another_process_has_locked_is_refused(make_config):
    config = make_config()
    quantize(config)
    with (
        open_journal(config.run_path, Disk()),
        pytest.raises(StoppedError, match="another process"),
    ):
        quantize(config)


def test_a_changed_commit_is_refused(make_config):
    config = make_config()
    quantize(config)
    record = config.run_path / "commits" / "00001"
    content = json.loads(record.read_text())
    content["report"]["loss_after"] = 0.0
    record.write_text(json.dumps(content))
    with pytest.raises(InputError, match="commits/00001: checksum"):
        quantize(config)


def test_a_missing_commit_between_others_is_refused(make_config):
    config = make_config()
    quantize(config)
    (config.run_path / "commits" / "00001").unlink()
    with pytest.raises(InputError, match="commits/00002"):
        quantize(config)


def test_a_run_directory_with_foreign_files_is_refused_and_not_changed(make_config):
    config = make_config()
    config.run_path.mkdir()
    (config.run_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a cbqstream run"):
        quantize(config)
    assert files_of(config.run_path) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("name", ["tmp", "parts", "commits"])
def test_a_foreign_folder_with_subfolders_named_as_in_a_run_is_refused_and_not_changed(make_config, name):
    config = make_config()
    (config.run_path / name).mkdir(parents=True)
    (config.run_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a cbqstream run"):
        quantize(config)
    assert files_of(config.run_path) == {f"{name}/thesis.txt": b"mine"}


def test_a_finished_run_refuses_an_output_folder_that_holds_another_model(make_config, tmp_path):
    config = make_config()
    quantize(config)
    other = shutil.copytree(config.model, tmp_path / "other")
    before = files_of(other)
    with pytest.raises(UsageError, match="not the result of this run"):
        quantize(QuantizeConfig.from_dict({**config.to_dict(), "out": str(other), "run_dir": str(config.run_path)}))
    assert files_of(other) == before


def test_an_output_that_is_a_symbolic_link_is_refused_before_the_run_starts(make_config, tmp_path):
    config = make_config()
    (tmp_path / "empty").mkdir()
    Path(config.out).symlink_to(tmp_path / "empty")
    with pytest.raises(UsageError, match="a link or a mount point"):
        quantize(config)
    assert not config.run_path.exists()


def test_only_the_two_newest_window_states_are_kept(make_config):
    """A window state is as large as half a window; all of them would be as large as the model. With two, a window can be rolled back."""
    config = make_config()
    seen = []

    def watch(number, name, path):
        if name == "publish" or (name == "rename" and path.parent.name == "commits"):
            states = config.run_path.rglob("parts/*/state.safetensors")
            seen.append(sorted(file.parent.name for file in states))

    quantize(config, disk=Disk(watch))
    assert seen == [["00000"], ["00000", "00001"], ["00000", "00001"], ["00001"]]
    assert list((config.run_path / "tmp").iterdir()) == []


def test_a_weight_that_is_not_finite_is_an_error_of_one_line_that_names_its_place(make_config, tmp_path):
    folder = save_model(tmp_path / "model", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r'"model\.layers\.1\.mlp\.up_proj\.weight": 1 non-finite values \(first at 197\)'
    ):
        quantize(make_config(model=folder))
