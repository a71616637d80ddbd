"""Command line: flags, help, output, exit codes, one-line errors, and no files written by a command that fails at once."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.core import TyperOption

from cbqstream.cli import main
from cbqstream.errors import StoppedError, UsageError
from cbqstream.options import OPTIONS, config_from_options
from cbqstream.run import pipeline
from killing import windows_committed
from tiny import SEQ_LEN


def call(monkeypatch, capsys, *arguments):
    """Run `cbqstream ARGUMENTS` in this process. Returns the exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["cbqstream", *map(str, arguments)])
    monkeypatch.setattr(main, "interrupt_on_signals", lambda: None)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def cbqstream(monkeypatch, capsys):
    """A function that runs the command line with its arguments. It returns the exit code, standard output and standard error."""
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def options(tokens, *more):
    """Flags of a small, fast run of `quantize`, followed by other flags."""
    return (
        "--dataset",
        tokens,
        "--num-samples",
        8,
        "--seq-len",
        SEQ_LEN,
        "--group-size",
        32,
        "--epochs",
        1,
        "--threads",
        1,
        *more,
    )


def test_a_run_is_quantized_resumed_and_evaluated(cbqstream, tiny_models, tokens, tmp_path):
    out = tmp_path / "out"
    code, text, err = cbqstream(
        "quantize", tiny_models["llama"], out, *options(tokens, "--log-json", tmp_path / "log.jsonl")
    )
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert len(lines) == 5
    for number, line in enumerate(lines[:3], 1):
        pattern = (
            rf"window {number}/3  blocks \d-\d  loss \S+ -> \S+  changed \S+%  \d+ s, \d+% \w+  RAM \d\.\d\d GiB"
            r"  ETA \S+( +reverted: held-out loss increased)?"
        )
        assert re.fullmatch(pattern, line)
    assert lines[3:] == ["quantized: 100.0% of the weights of the blocks", f"done: {out}"]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["window"] for entry in logged] == [0, 1, 2]

    code, text, _ = cbqstream("status", f"{out}.run")
    assert code == 0
    assert "windows done: 3 of 3" in text
    assert text.splitlines()[-1] == "finished"

    out.rename(tmp_path / "away")
    out.mkdir()
    (out / "config.json").write_text("{}")
    _, text, _ = cbqstream("status", f"{out}.run")
    assert "the model is not assembled yet" in text.splitlines()[-1]
    (out / "config.json").unlink()

    assert cbqstream("resume", f"{out}.run")[0] == 0

    for model in (tiny_models["llama"], out):
        code, text, _ = cbqstream("eval", model, "--text", tokens, "--seq-len", SEQ_LEN, "--threads", 1)
        assert code == 0
        assert re.fullmatch(r"tokens\.npy: perplexity \d+\.\d{4} \(16 x 16 tokens\)\n", text)


def test_flags_can_have_underscores_instead_of_hyphens(cbqstream, tiny_models, tokens, tmp_path):
    code, _, _ = cbqstream(
        "quantize",
        tiny_models["opt"],
        tmp_path / "out",
        "--dataset",
        tokens,
        "--num_samples=8",
        "--seq_len",
        SEQ_LEN,
        "--group_size=-1",
        "--rounding=nearest",
    )
    assert code == 0
    assert '"strategy": "channel"' in (tmp_path / "out" / "config.json").read_text()


def test_plan_takes_the_flags_of_quantize_and_writes_nothing(cbqstream, tiny_models, tmp_path):
    """OUT and --dataset can be left out, and the arguments can have any order."""
    flags = ("--num-samples", 8, "--seq_len", SEQ_LEN, "--group-size", 32, "--device", "cpu")
    before = sorted(tmp_path.rglob("*"))
    code, text, err = cbqstream("plan", tiny_models["llama"], "--without-time", *flags)
    assert (code, err) == (0, "")
    assert text.splitlines()[0] == "windows: 3"
    assert "the run takes: all layers in memory (the fastest, and no limit is set)" in text.splitlines()
    assert sum(line.startswith("  --window-size 1 --overlap 0  ") for line in text.splitlines()) == 1
    code, text, _ = cbqstream("plan", tiny_models["llama"], "--json", *flags, "--threads", 1)
    plan = json.loads(text)
    assert (code, plan["windows"]) == (0, 3)
    assert plan["seconds_total"] == pytest.approx(sum(plan["seconds"].values()))
    assert {"reading", "writing"} < plan["seconds"].keys()
    assert plan["smaller"]["--epochs 3"]["seconds_total"] < plan["seconds_total"]
    assert plan["modes"]["all layers in memory"]["seconds_total"] == plan["seconds_total"]
    assert sorted(tmp_path.rglob("*")) == before
    code, other, _ = cbqstream("plan", *flags, "--without-time", "--json", tiny_models["llama"], tmp_path / "out")
    assert code == 0
    assert json.loads(other)["ram"] == json.loads(text)["ram"]
    code, _, err = cbqstream("plan", tiny_models["llama"], "--without-time", "--group-size", 24)
    assert (code, err.count("group size 24 does not divide the 64 columns of model.layers.")) == (2, 1)
    assert cbqstream("plan", "--without-time")[0] == 2
    assert cbqstream("plan", tiny_models["llama"], "--no-such-flag", 3)[0] == 2
    assert cbqstream("plan", tiny_models["llama"], "--bits", 3)[0] == 2
    assert cbqstream("plan", tmp_path / "nowhere", "--without-time")[0] == 65


def test_a_recipe_gives_defaults_of_flags(cbqstream, tiny_models, tokens, tmp_path):
    """Keys of a recipe can be written with hyphens or underscores. Flags on the command line take precedence."""
    recipe, out = tmp_path / "w3.toml", tmp_path / "out"
    recipe.write_text(
        f'scheme = "W3A16"\ngroup-size = 64\nsymmetric = false\nrounding = "nearest"\ndataset = "{tokens}"\nseq_len = {SEQ_LEN}\n'
    )
    code, _, err = cbqstream(
        "quantize", tiny_models["llama"], out, "--recipe", recipe, "--group-size", 32, "--num_samples", 8
    )
    assert (code, err) == (0, "")
    group = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (group["num_bits"], group["group_size"], group["symmetric"]) == (3, 32, False)
    recipe.write_text('window-size = 1\noverlap = 0\ngroup-size = 32\nignore = "down_proj"\noverride = ["o_proj=W8"]')
    code, text, err = cbqstream("plan", tiny_models["llama"], "--without-time", "--recipe", recipe)
    assert (code, err, text.splitlines()[0]) == (0, "", "windows: 4")


BAD_RECIPES = {
    "unknown": ("epoch = 3", '{recipe}: unknown key "epoch" (epochs?).'),
    "nothing like it": ("bitz = 3", '{recipe}: unknown key "bitz".'),
    "a table": ("[seed]\nsize = 2", '{recipe}: "seed" is neither a value nor a list of values.'),
    "twice": ("seq-len = 2\nseq_len = 3", '{recipe}: "seq_len" appears twice, once with - and once with _.'),
    "another recipe": ('recipe = "a"', '{recipe}: unknown key "recipe".'),
    "not TOML": ("scheme: W4A16", "{recipe}: not TOML (Expected '=' after a key"),
    "out of range": ("group-size = 7", "group_size is 7. It must be a multiple of 8"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_is_refused_in_one_line(cbqstream, tiny_models, tokens, tmp_path, case):
    content, message = BAD_RECIPES[case]
    recipe = tmp_path / "r.toml"
    recipe.write_text(content)
    code, _, err = cbqstream(
        "quantize", tiny_models["llama"], tmp_path / "out", "--recipe", recipe, "--dataset", tokens
    )
    assert err.startswith(f"cbqstream: error: {message.format(recipe=recipe)}")
    assert (code, err.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_a_recipe_must_be_an_existing_toml_file(cbqstream, tiny_models, tokens, tmp_path):
    for name, message in (("r.yaml", "recipes are TOML (NAME.toml)."), ("r.toml", "No such file or directory.")):
        code, _, err = cbqstream(
            "quantize", tiny_models["llama"], tmp_path / "out", "--recipe", tmp_path / name, "--dataset", tokens
        )
        assert (code, err) == (2, f"cbqstream: error: {tmp_path / name}: {message}\n")


def test_a_run_that_was_stopped_shows_how_to_resume_it(cbqstream, tiny_models, tokens, tmp_path, monkeypatch):
    real = pipeline.reconstruct
    calls = []

    def stop_in_the_second_window(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise StoppedError("stopped by SIGTERM.")
        return real(*arguments)

    monkeypatch.setattr(pipeline, "reconstruct", stop_in_the_second_window)
    out = tmp_path / "out"
    code, _, err = cbqstream("quantize", tiny_models["llama"], out, *options(tokens))
    assert code == 75
    assert err.splitlines() == [f"cbqstream: error: stopped by SIGTERM. To resume: cbqstream resume {out}.run"]
    code, text, _ = cbqstream("status", f"{out}.run")
    assert code == 0
    assert "windows done: 1 of 3" in text
    assert f"cbqstream resume {out}.run" in text
    monkeypatch.setattr(pipeline, "reconstruct", real)
    code, text, _ = cbqstream("resume", f"{out}.run")
    assert code == 0
    assert len([line for line in text.splitlines() if line.startswith("window ")]) == 2
    assert windows_committed(Path(f"{out}.run")) == 3


SIGNAL_DURING_SETUP = """
import os, signal, sys
from cbqstream.cli import main
real = signal.signal
def hooked(number, handler):
    real(number, handler)
    if number == signal.{first} and not os.environ.get("sent"):
        os.environ["sent"] = "yes"
        os.kill(os.getpid(), number)
signal.signal = hooked
sys.argv = ["cbqstream", "--help"]
main.main()
"""


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_a_signal_that_arrives_while_handlers_are_installed_stops_with_75(first):
    """The process sends itself the signal right after the handler for it is installed."""
    ended = subprocess.run(
        [sys.executable, "-c", SIGNAL_DURING_SETUP.format(first=first)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "", f"cbqstream: error: stopped by {first}.\n")


def test_sigterm_during_a_run_stops_with_75(tiny_models, tokens, tmp_path):
    arguments = [
        str(value)
        for value in ("quantize", tiny_models["llama"], tmp_path / "out", *options(tokens)[:-4], "--epochs", 4000)
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "cbqstream", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    run = tmp_path / "out.run"
    while not list((run / "acts").glob("*")) if run.exists() else True:
        assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err == f"cbqstream: error: stopped by SIGTERM. To resume: cbqstream resume {run}\n"


# --- bad models: (function that damages a copy of a good model, message) -------------------------------------------------------


def edit_config(**changes):
    """A function that changes entries of the config.json of a model."""

    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def shard(folder, number=1):
    """Path of a shard of a model, by its number from 0."""
    return sorted(folder.glob("*.safetensors"))[number]


def truncate(folder):
    """Cut 100 bytes off the end of shard 1."""
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def only_pickles(folder):
    """Replace the safetensors of a model by a pickle checkpoint."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def edit_index(change):
    """A function that changes the weight map in the index of a model."""

    def edit(folder):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        change(index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def leave_folder(weight_map):
    """Point a tensor to a file outside the model folder."""
    weight_map["lm_head.weight"] = "../x.safetensors"


BAD_MODELS = {
    "missing folder": (
        shutil.rmtree,
        "{model}: no such folder. Give the folder of a model with config.json and safetensors.",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "{model}/config.json: missing. A model folder has config.json.",
    ),
    "config not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "{model}/config.json: not JSON. Download it again.",
    ),
    "only pickles": (
        only_pickles,
        "{model}: only pickle checkpoints, which are never read. Convert them to safetensors first.",
    ),
    "git-lfs pointer": (
        lambda folder: shard(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "{shard}: a git-lfs pointer, not weights. Run `git lfs pull` in the model's folder.",
    ),
    "truncated shard": (truncate, "{shard}: file is {size} bytes, header describes {more}. Download it again."),
    "missing shard": (
        lambda folder: shard(folder).unlink(),
        "{shard}: missing ({tensors} tensors). Download it again.",
    ),
    "index leaves the folder": (
        edit_index(leave_folder),
        '{model}/model.safetensors.index.json: shard name "../x.safetensors" leaves the model folder.',
    ),
    "unknown architecture": (
        edit_config(model_type="mambo"),
        '{model}/config.json: architecture "mambo" is not in transformers. Use another model.',
    ),
    "hidden size of 0": (
        edit_config(hidden_size=0),
        "{model}/config.json: hidden_size is 0. It must be a whole number from 1 to 1,048,576.",
    ),
    "more blocks in the weights": (
        edit_config(num_hidden_layers=3),
        "{model}: config.json describes 3 blocks, but the weights have 4.",
    ),
    "fewer blocks in the weights": (
        edit_config(num_hidden_layers=5),
        '{model}: tensor "model.layers.4.self_attn.q_proj.weight": missing from the weights. Download the model again.',
    ),
    "shape": (
        edit_config(intermediate_size=96),
        '{model}: tensor "model.layers.0.mlp.gate_proj.weight": has shape [128, 64], but config.json requires [96, 64].',
    ),
    "impossible norm": (
        edit_config(rms_norm_eps=None),
        "{model}/config.json: does not describe a llama model: ",
    ),
    "already quantized": (
        edit_config(quantization_config={"quant_method": "hqq"}),
        "{model}/config.json: the model is already quantized (hqq), which is not decoded. Give the original model, or one in awq,",
    ),
    "quantized in an unknown way": (
        edit_config(quantization_config="x"),
        "{model}/config.json: the model is already quantized (None), which is not decoded. Give the original",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_refused_with_65_and_nothing_is_written(cbqstream, tiny_models, tokens, tmp_path, case):
    damage, message = BAD_MODELS[case]
    model = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    broken = shard(model)
    held = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    facts = {
        "size": broken.stat().st_size - 100,
        "more": broken.stat().st_size,
        "tensors": list(held.values()).count(broken.name),
    }
    damage(model)
    code, out, err = cbqstream("quantize", model, tmp_path / "out", *options(tokens))
    assert err.startswith(f"cbqstream: error: {message.format(model=model, shard=broken, **facts)}")
    assert err.count("\n") == 1
    assert (code, out) == (65, "")
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}


BAD_ARGUMENTS = {
    "scheme": (
        ("--scheme", "W1A16"),
        2,
        "scheme 'W1A16' is not supported. Use W2 to W8 with A16, A8 or A4, such as W4A16.",
    ),
    "profile": (("--profile", "best"), 2, "profile 'best' is not paper, quick, fast, default, accurate."),
    "smoothing rule": (("--smoothing-rule", "mine"), 2, "smoothing_rule 'mine' is not paper, huawei or search."),
    "smoothing": (("--smoothing", "yes"), 2, "smoothing 'yes' is not never, quantized or always."),
    "schedule": (("--schedule", "step"), 2, "schedule 'step' is not linear or cosine."),
    "group size that does not divide": (
        ("--group-size", 48),
        2,
        "group size 48 does not divide the 64 columns of model.layers.0.self_attn.q_proj.weight. 32 fits; or use -1 (per channel).",
    ),
    "group size": (
        ("--group-size", 7),
        2,
        "group_size is 7. It must be a multiple of 8, or -1 for one scale per channel.",
    ),
    "overlap": (("--overlap", 2), 2, "window overlap is 2. It must be 0 to 1 for a window of 2 blocks."),
    "rounding": (("--rounding", "up"), 2, "rounding 'up' is not signround, lora_rounding, gptq or nearest."),
    "too little text": (
        ("--num-samples", 17),
        65,
        "{tokens}: has 256 tokens, 272 are needed (17 x 16). Use more text, or fewer samples.",
    ),
    "missing text": (("--dataset", "/nowhere.txt"), 65, "/nowhere.txt: no such file."),
    "nothing left": (
        ("--keep-first", 2, "--keep-last", 2),
        2,
        "keep_first + keep_last is 4. It must be below the 4 blocks of the model.",
    ),
    "memory": (
        ("--max-ram", "300MiB"),
        69,
        "--max-ram 0.29 GiB: this run needs 0.47 (process 0.47). No smaller setting fits; use a higher limit.",
    ),
    "no size": (("--max-ram", "16"), 2, "'16' is not a size. Write it as 16GiB or 800MB."),
    "device": (("--device", "cuda:7"), 2, "device cuda:7 is not available. Use --device cpu."),
    "device name": (("--device", "tpu"), 2, "device 'tpu' is not auto, cpu or cuda."),
    "run inside OUT": (
        ("--run-dir", "{out}/run"),
        2,
        "{out}/run: the run directory is inside OUT. Use another folder.",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_and_nothing_is_written(cbqstream, tiny_models, tokens, tmp_path, case):
    arguments, expected, message = BAD_ARGUMENTS[case]
    out = tmp_path / "out"
    arguments = [str(argument).format(out=out) for argument in arguments]
    code, _, err = cbqstream("quantize", tiny_models["llama"], out, *options(tokens), *arguments)
    assert err == f"cbqstream: error: {message.format(out=out, tokens=tokens)}\n"
    assert code == expected
    assert not list(tmp_path.iterdir())


def test_quantize_refuses_an_out_folder_that_is_not_empty(cbqstream, tiny_models, tokens, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, err = cbqstream("quantize", tiny_models["llama"], tmp_path / "out", *options(tokens))
    assert code == 2
    assert err == f"cbqstream: error: {tmp_path}/out: exists and is not empty. Give another OUT.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_quantize_uses_an_empty_out_folder(cbqstream, tiny_models, tokens, tmp_path):
    (tmp_path / "out").mkdir()
    assert (
        cbqstream("quantize", tiny_models["llama"], tmp_path / "out", *options(tokens, "--rounding", "nearest"))[0] == 0
    )
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_run_with_another_seed_is_refused_with_78(cbqstream, tiny_models, tokens, tmp_path):
    assert cbqstream("quantize", tiny_models["llama"], tmp_path / "out", *options(tokens))[0] == 0
    code, _, err = cbqstream("quantize", tiny_models["llama"], tmp_path / "out", *options(tokens, "--seed", 5))
    assert code == 78
    assert "settings.seed: 0 -> 5" in err
    assert err.count("\n") == 1


def test_check_rollback_and_clean(cbqstream, tiny_models, tokens, tmp_path):
    """A run is stopped after window 2, checked, rolled back to window 1, resumed and deleted. The result stays."""
    out, run = tmp_path / "out", tmp_path / "out.run"
    arguments = ("quantize", tiny_models["llama"], out, *options(tokens))
    code, _, err = cbqstream(*arguments, "--stop-after-window", 2)
    assert (code, err) == (
        75,
        f"cbqstream: error: stopped after window 2, as asked. To resume: cbqstream resume {run}\n",
    )

    code, text, _ = cbqstream("check", run, "--read-data")
    assert code == 0
    assert text.splitlines() == [
        "records: 2 of 3 commits, an unbroken chain",
        "parts: 3 files, 3 read and as committed",
        "streams: 2 of 8 segments, read and as committed",
        "source: 29 of 29 tensors that were read are unchanged",
        "ok",
    ]
    code, _, err = cbqstream("clean", run)
    assert (code, err) == (
        2,
        f"cbqstream: error: {run}: 2 of 3 commits are done."
        f" Run cbqstream resume {run}, or delete it with --unfinished.\n",
    )
    code, _, err = cbqstream("rollback", run, "--to", 2)
    assert (code, err) == (
        2,
        f"cbqstream: error: {run}: 2 windows are done, so --to must be smaller than that.\n",
    )
    code, text, _ = cbqstream("rollback", run, "--to", 1)
    assert (code, text) == (0, f"1 of 3 windows are kept. To resume: cbqstream resume {run}\n")
    assert cbqstream("resume", run)[0] == 0

    code, text, _ = cbqstream("check", run)
    assert code == 0
    assert f"result: {out}" in text.splitlines()
    code, text, _ = cbqstream("check", out, "--read-data")
    assert (code, text) == (
        0,
        "model: 4 blocks, 39 tensors, all finite, 5 shards with the checksums of SHA256SUMS\nok\n",
    )
    code, text, _ = cbqstream("clean", run)
    assert (code, text) == (0, f"deleted: {run}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert cbqstream("check", out)[0] == 0
    assert cbqstream("check", tmp_path)[0] == 65


def test_only_the_newest_window_or_all_windows_can_be_rolled_back(cbqstream, tiny_models, tokens, tmp_path):
    """A run keeps the window state of its newest window only, and an older window cannot be the last one without its state."""
    run = tmp_path / "out.run"
    assert cbqstream("quantize", tiny_models["llama"], tmp_path / "out", *options(tokens))[0] == 0
    code, _, err = cbqstream("rollback", run, "--to", 1)
    assert (code, err) == (
        2,
        f"cbqstream: error: {run}: the state of window 1 is no longer kept. Only the newest window can be rolled back, or all: --to 0.\n",
    )
    code, text, _ = cbqstream("rollback", run, "--to", 0)
    out = tmp_path / "out"
    assert (code, text) == (
        0,
        f"0 of 3 windows are kept. To resume: move {out} away, then cbqstream resume {run}\n",
    )
    assert windows_committed(run) == 0
    assert cbqstream("resume", run)[0] == 2
    out.rename(tmp_path / "moved")
    assert cbqstream("resume", run)[0] == 0


def test_check_reports_all_damaged_files(cbqstream, tiny_models, tokens, tmp_path):
    """Two shards of the run are damaged. The result is reported too, because its shards are the same files."""
    run = tmp_path / "out.run"
    assert cbqstream("quantize", tiny_models["llama"], tmp_path / "out", *options(tokens))[0] == 0
    shards = sorted((run / "parts").rglob("block-*"))
    for shard in shards[:2]:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    code, _, err = cbqstream("check", run, "--read-data")
    assert code == 65
    reported = [line.split(": ")[2] for line in err.splitlines()]
    assert [*dict.fromkeys(reported)] == [*map(str, shards[:2]), str(tmp_path / "out")]


def test_resume_and_status_of_a_folder_without_a_run_fail_with_65(cbqstream, tmp_path):
    for command in ("resume", "status"):
        code, _, err = cbqstream(command, tmp_path)
        assert (code, err) == (65, f"cbqstream: error: {tmp_path}: no cbqstream run (run.json is missing).\n")


BAD_EVALUATIONS = {
    "device": (("--device", "foo"), "device 'foo' is not auto, cpu or cuda."),
    "length": (("--seq-len", 1), "seq_len is 1. It must be 2 or more."),
    "batch": (("--batch-size", 0), "batch_size is 0. It must be at least 1."),
    "scratch": (("--scratch", "/nowhere"), "/nowhere: no such folder."),
    "limit": (("--limit", 3), "--limit is for --tasks. Leave it out."),
    "questions": (("--num-questions", 3), "--num-questions is for --choices. Leave it out."),
    "revision": (("--revision", "main"), "{model} is a folder. --revision is for a name on the Hub."),
}


@pytest.mark.parametrize("case", BAD_EVALUATIONS)
def test_bad_arguments_of_eval_are_refused_with_2(cbqstream, tiny_models, tokens, case):
    arguments, message = BAD_EVALUATIONS[case]
    code, out, err = cbqstream("eval", tiny_models["llama"], "--text", tokens, *arguments)
    message = message.format(model=tiny_models["llama"])
    assert (code, out, err) == (2, "", f"cbqstream: error: {message}\n")


def test_eval_refuses_segments_that_are_longer_than_the_learned_positions(cbqstream, tiny_models, tokens):
    """OPT has 64 learned positions."""
    code, _, err = cbqstream("eval", tiny_models["opt"], "--text", tokens, "--seq-len", 65)
    assert (code, err) == (2, "cbqstream: error: seq_len is 65. It must be 2 to 64, the model's positions.\n")


def test_a_log_that_cannot_be_opened_fails_with_74_and_nothing_is_written(cbqstream, tiny_models, tokens, tmp_path):
    code, _, err = cbqstream(
        "quantize", tiny_models["llama"], tmp_path / "out", *options(tokens, "--log-json", "/nowhere/log")
    )
    assert (code, err) == (74, "cbqstream: error: /nowhere/log: No such file or directory.\n")
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_is_refused_with_2(cbqstream):
    code, _, err = cbqstream("quantize", "--bitz", "3")
    assert code == 2
    assert "--bitz" in err


def test_help_of_the_program_shows_how_to_start(cbqstream):
    code, out, _ = cbqstream("--help")
    assert code == 0
    assert "cbqstream quantize MODEL OUT" in out


def test_help_of_quantize_has_five_groups_of_flags_with_the_defaults_of_the_profile(cbqstream):
    """Defaults in parentheses are those of the profile `default`. All flags are shown in full in 80 columns."""
    code, out, _ = cbqstream("quantize", "--help")
    assert code == 0
    groups = re.findall(r"^([A-Z].*):$", out, re.MULTILINE)
    assert groups == ["Arguments", "Model and output", "Calibration", "Method", "Limits", "Run", "Options"]
    for option in OPTIONS.values():
        group = out.split(f"\n{option.panel}:\n")[1].split("\n\n")[0]
        assert option.name in ("model", "out") or f"  --{option.name.replace('_', '-')} " in group
    text = " ".join(out.split())
    assert "--epochs <int> Passes over the calibration segments per window. [default: (6)]" in text
    assert "--window-size <int> Blocks that are optimized together. [default: (2)]" in text
    assert "[default: (no-truncate-weights)]" in text
    assert "--num-samples <int> Number of calibration segments. [default: 128]" in text


FLAGS_OF_SETTINGS = [
    "--activation-scale-lr",
    "--activation-strategy",
    "--batch-size",
    "--blocks-path",
    "--calibrate-all-experts",
    "--channel-balance",
    "--damping",
    "--dataset",
    "--device",
    "--end-to-end-epochs",
    "--end-to-end-lr",
    "--epochs",
    "--experts",
    "--group-size",
    "--head-stride",
    "--head-weight",
    "--ignore",
    "--init",
    "--keep-first",
    "--keep-last",
    "--kernels",
    "--kl-weight",
    "--max-ram",
    "--max-shift",
    "--max-vram",
    "--no-calibrate-all-experts",
    "--no-quantize-lm-head",
    "--no-symmetric",
    "--no-truncate-weights",
    "--num-samples",
    "--outlier-lambda1",
    "--outlier-lambda2",
    "--overlap",
    "--override",
    "--penalty-weight",
    "--profile",
    "--quantize-lm-head",
    "--recipe",
    "--revision",
    "--robust-tokens",
    "--rounding",
    "--rounding-lr",
    "--rounding-rank",
    "--run-dir",
    "--scale-lr",
    "--schedule",
    "--scheme",
    "--seed",
    "--seq-len",
    "--smoothing",
    "--smoothing-rule",
    "--symmetric",
    "--target-mix",
    "--threads",
    "--token-balance",
    "--truncate-weights",
    "--window-size",
]
"""Flags that `quantize` and `plan` share."""
FLAGS_OF_ONE_COMMAND = {
    "quantize": [
        "--allow-links",
        "--allow-numerics-change",
        "--allow-partial",
        "--allow-shared-run-dir",
        "--log-json",
        "--push-to",
        "--stop-after-window",
    ],
    "plan": ["--allow-links", "--allow-partial", "--json", "--without-time"],
}


@pytest.mark.parametrize("name", FLAGS_OF_ONE_COMMAND)
def test_flags_of_quantize_and_plan_are_frozen(name):
    """Scripts and recipes depend on the names of the flags."""
    command = typer.main.get_command(main.app).commands[name]
    options = [parameter for parameter in command.params if isinstance(parameter, TyperOption)]
    flags = sorted(flag for option in options for flag in (*option.opts, *option.secondary_opts))
    assert flags == sorted([*FLAGS_OF_SETTINGS, *FLAGS_OF_ONE_COMMAND[name]])
    arguments = [parameter.name for parameter in command.params if not isinstance(parameter, TyperOption)]
    assert arguments == ["model", "out"]


@pytest.mark.parametrize(
    ("option", "message"),
    [("epoch", r"^unknown setting 'epoch' \(epochs\?\)\.$"), ("bitz", r"^unknown setting 'bitz'\.$")],
)
def test_config_from_options_refuses_an_unknown_option_with_the_nearest_name(option, message):
    """No name is suggested if none is similar."""
    with pytest.raises(UsageError, match=message):
        config_from_options({"model": "MODEL", "out": "OUT", "dataset": "DATASET", option: 3})


def test_the_package_can_be_run_as_a_module(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(4))
    command = [sys.executable, "-m", "cbqstream", "eval", str(tmp_path), "--text", str(tmp_path / "x.npy")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 65
    assert result.stderr == f"cbqstream: error: {tmp_path}/config.json: missing. A model folder has config.json.\n"
