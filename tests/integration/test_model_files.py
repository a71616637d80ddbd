"""The files of a model folder: tensors and files that are copied, shards in subfolders and behind links, and what is left out."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbqstream import evaluate, plan, quantize
from cbqstream.checkpoint.folder import quantization_of
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.cli.main import _answer, app
from cbqstream.commands.check import check
from cbqstream.commands.export import export
from cbqstream.errors import InputError, StoppedError
from cbqstream.hub import _NOT_DOWNLOADED
from cbqstream.packed.output import WEIGHTS, OtherFiles, other_files
from cbqstream.records import RunWarning
from tiny import SEQ_LEN, files_of

CPU = torch.device("cpu")
NEAREST = {"rounding": "nearest"}


@pytest.fixture
def model(tiny_models, tmp_path) -> Path:
    """A copy of a tiny Llama in several shards, which a test may change."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


@pytest.mark.parametrize("whole", [True, False])
def test_every_command_refuses_an_adapter(model, make_config, tokens, tmp_path, whole):
    """An adapter beside the weights of a model would be left out, and without them there is no model."""
    for path in () if whole else model.iterdir():
        path.unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    config = make_config(model=str(model))
    text = (
        f"{model}: holds a LoRA adapter (adapter_config.json), whose weights would be left out. Merge it into the base"
    )
    for call in (
        lambda: quantize(config),
        lambda: plan(config, with_time=False),
        lambda: evaluate(model, tokens, device="cpu"),
        lambda: export(model, tmp_path / "exported", "dense"),
    ):
        with pytest.raises(InputError) as refused:
            call()
        assert str(refused.value).startswith(text)
    if whole:
        assert check(model, read_data=False).problems == [str(refused.value)]
    else:
        with pytest.raises(InputError, match="holds a LoRA adapter"):
            check(model, read_data=False)


PLACES = {
    "config.json": ({"quantization_config": {"quant_method": "fp8"}}, "config.json", "fp8"),
    "text_config": (
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        "config.json: text_config",
        "fp8",
    ),
    "part of a part": (
        {"thinker_config": {"text_config": {"compression_config": {"quant_method": "sparse"}}}},
        "config.json: thinker_config: text_config",
        "sparse",
    ),
    "outermost": ({"text_config": {"quantization_config": {"a": 1}}, "quantization_config": 7}, "config.json", "None"),
    "ModelOpt": (
        {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}},
        "hf_quant_config.json",
        "modelopt",
    ),
    "AutoGPTQ": ({"quantize_config.json": {"bits": 4}}, "quantize_config.json", "gptq"),
    "AutoGPTQ with a method": (
        {"quantize_config.json": {"quant_method": "marlin"}},
        "quantize_config.json",
        "marlin",
    ),
    "AutoAWQ": ({"quant_config.json": {"w_bit": 4, "version": "GEMM"}}, "quant_config.json", "awq"),
}
"""What describes that a model is quantized: new keys of config.json, or a new file; its place and the method in messages."""


@pytest.mark.parametrize("case", PLACES)
def test_a_model_without_its_quantized_weights_is_refused_by_method_and_place(model, make_config, tokens, case):
    changes, place, method = PLACES[case]
    config = json.loads((model / "config.json").read_text())
    for key, value in changes.items():
        if key.endswith(".json"):
            (model / key).write_text(json.dumps(value))
        else:
            config[key] = value
    (model / "config.json").write_text(json.dumps(config))
    settings = make_config(model=str(model))
    for call in (
        lambda: quantize(settings),
        lambda: plan(settings, with_time=False),
        lambda: evaluate(model, tokens, device="cpu"),
    ):
        with pytest.raises(InputError) as refused:
            call()
        assert str(refused.value).startswith(f"{model}/{place}: the model is already quantized ({method})")
    assert quantization_of(model, config).get("quant_method") == (None if method == "None" else method)


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_empty_quantization_config_is_none(model, nothing):
    assert quantization_of(model, {"quantization_config": nothing, "text_config": {"hidden_size": 64}}) is None


def put(folder: Path, *names: str) -> None:
    """Write files with their own names as content, in new subfolders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


SMALL = (
    "1_Pooling/config.json",
    "additional_chat_templates/tool.jinja",
    "additional_chat_templates/deep/er/rag.jinja",
    "vocab.txt",
)
LEFT_OUT = {
    "2_Dense/": ("2_Dense/config.json", "2_Dense/model.safetensors"),
    "big/": ("big/table.csv",),
    "consolidated.safetensors": ("consolidated.safetensors",),
    "linked/": (),
    "mtp.safetensors": ("mtp.safetensors",),
    "onnx/": ("onnx/config.json", "onnx/sub/model.onnx_data"),
    "original/": ("original/params.json", "original/consolidated.00.pth"),
    "weird/": ("weird/a.txt",),
}
"""Files of each entry of a model folder that is left out."""


def test_small_files_are_copied_with_their_folders_and_other_weights_are_named(model, make_config, tmp_path):
    put(model, *SMALL, *itertools.chain.from_iterable(LEFT_OUT.values()))
    put(model, ".git/config", ".cache/huggingface/x", "1_Pooling/.hidden/x")
    os.truncate(model / "big" / "table.csv", (64 << 20) + 1)
    (model / "linked").symlink_to(model / "1_Pooling")
    (model / "weird" / "link").symlink_to(model / "1_Pooling")
    (model / "vocab.txt").rename(tmp_path / "vocab")
    (model / "vocab.txt").symlink_to(tmp_path / "vocab")
    events = []
    out = quantize(make_config(model=str(model), reconstruction=NEAREST), events.append)
    named = ", ".join(LEFT_OUT)
    warning = f"{model}: not part of the model, and not copied: {named}. Copy what you need of it into the result."
    assert [event.text for event in events if isinstance(event, RunWarning)] == [warning]
    made = export(out, tmp_path / "exported", "dense")
    for folder in (out, made):
        found = {name: content.decode() for name, content in files_of(folder).items() if name in SMALL}
        assert found == {name: name for name in SMALL}
        assert [path.name for path in sorted(folder.iterdir()) if path.is_dir()] == [
            "1_Pooling",
            "additional_chat_templates",
        ]
        assert not {"2_Dense", "mtp.safetensors", "consolidated.safetensors"} & {path.name for path in folder.iterdir()}
        assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_dir()} == {
            folder.stat().st_mode & 0o777
        }
    assert not (out / "vocab.txt").is_symlink()


def test_a_plain_model_folder_has_no_files_that_are_left_out(tiny_models):
    assert other_files(tiny_models["llama"]) == OtherFiles(("generation_config.json",), ())


def test_weights_that_are_not_copied_are_not_downloaded_either():
    assert {f"*{suffix}" for suffix in WEIGHTS} - {*_NOT_DOWNLOADED} == {"*.safetensors"}


def test_shards_that_are_links_to_another_disk_are_read_with_allow_links(make_config, model, tokens, tmp_path, capsys):
    """Every command takes the flag, and without it the message names it. An interrupted run says that it is needed again."""
    expected = files_of(quantize(make_config(name="expected", reconstruction=NEAREST)))
    disk = tmp_path / "disk"
    disk.mkdir()

    def move(folder: Path) -> None:
        for shard in folder.glob("*.safetensors"):
            shutil.copy(shard, disk / f"{folder.name}-{shard.name}")
            shard.unlink()
            shard.symlink_to(disk / f"{folder.name}-{shard.name}")

    def refused(*arguments: object) -> None:
        with pytest.raises(SystemExit) as stop:
            _answer([str(argument) for argument in arguments])
        assert stop.value.code == 65
        assert "outside the model. If you trust it, give --allow-links; or copy" in capsys.readouterr().err

    def done(*arguments: object) -> str:
        app([str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    move(model)
    out, run = tmp_path / "out", tmp_path / "out.run"
    flags = ["--dataset", tokens, "--num-samples", 16, "--seq-len", SEQ_LEN, "--group-size", 32, "--batch-size", 4]
    flags += ["--rounding", "nearest", "--epochs", 2, "--device", "cpu", "--threads", 1]
    lengths = ["--num-samples", 2, "--seq-len", SEQ_LEN, "--device", "cpu", "--threads", 1]
    refused("plan", model, *flags, "--without-time")
    done("plan", model, *flags, "--without-time", "--allow-links")
    refused("quantize", model, out, *flags)
    with pytest.raises(StoppedError, match=r"To resume: cbqstream resume \S+/out\.run --allow-links"):
        done("quantize", model, out, *flags, "--allow-links", "--stop-after-window", 1)
    refused("resume", run)
    done("resume", run, "--allow-links")
    assert files_of(out) == expected
    refused("eval", model, "--text", tokens, *lengths)
    done("eval", model, "--text", tokens, *lengths, "--allow-links")
    refused("check", run, "--read-data")
    done("check", run, "--read-data", "--allow-links")
    move(out)
    refused("check", out)
    assert "ok" in done("check", out, "--read-data", "--load", "--allow-links")
    refused("export", out, tmp_path / "dense", "--format", "dense")
    done("export", out, tmp_path / "dense", "--format", "dense", "--allow-links")
    assert not any(path.is_symlink() for path in (tmp_path / "dense").iterdir())
    refused("report", out, "--out", tmp_path / "page")
    done("report", out, "--out", tmp_path / "page", "--allow-links")
    refused("push", out, "me/tiny")


def add_tensors(model: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors to a model, in a shard of their own."""
    save_file(tensors, model / "more.safetensors")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "more.safetensors")
    path.write_text(json.dumps(index))


def move_shards(model: Path) -> None:
    """Move the first two shards of a model into subfolders, under one name."""
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    new = {}
    for folder, shard in zip(("a", "b/c"), sorted({*index["weight_map"].values()})[:2], strict=True):
        new[shard] = f"{folder}/part.safetensors"
        (model / folder).mkdir(parents=True)
        (model / shard).rename(model / new[shard])
    index["weight_map"] = {name: new.get(shard, shard) for name, shard in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def test_shards_in_subfolders_give_the_same_result(model, make_config, tiny_models, tokens, tmp_path):
    expected = files_of(quantize(make_config(reconstruction=NEAREST)))
    move_shards(model)
    config = make_config(model=str(model), name="moved", reconstruction=NEAREST)
    assert plan(config, with_time=False).source == plan(make_config(), with_time=False).source
    out = quantize(config)
    assert files_of(out) == expected
    lengths = {"num_samples": 4, "seq_len": SEQ_LEN, "device": "cpu", "threads": 1}
    assert evaluate(model, tokens, **lengths) == evaluate(tiny_models["llama"], tokens, **lengths)


def test_checksums_and_exports_of_a_result_with_shards_in_subfolders(make_config, tmp_path):
    out = quantize(make_config(reconstruction=NEAREST))
    expected = export(out, tmp_path / "flat", "dense")
    sums = out / "SHA256SUMS"
    table = {line.split()[1]: line.split()[0] for line in sums.read_text().splitlines()}
    first, second = sorted(table)[:2]
    move_shards(out)
    moved = {"a/part.safetensors": table.pop(first), "b/c/part.safetensors": table.pop(second)}
    sums.write_text("".join(f"{digest}  {name}\n" for name, digest in (table | moved).items()))
    assert check(out, read_data=True).problems == []
    made = export(out, tmp_path / "moved", "dense")
    assert {path.name for path in made.glob("*.safetensors")} > {"a-part.safetensors", "b-c-part.safetensors"}
    assert check(made, read_data=True).problems == []
    assert Checkpoint.open(made).fingerprint() == Checkpoint.open(expected).fingerprint()
    sums.write_text(sums.read_text().replace("b/c/part", "c/part"))
    (problem,) = check(out, read_data=True).problems
    assert problem.startswith(f"{out}/b/c/part.safetensors: is not listed in SHA256SUMS. Copy the model again")


def test_tensors_of_every_dtype_that_the_model_does_not_use_are_copied(model, make_config):
    """Such a tensor may stand in a block too. The result passes the check, which reads every byte."""
    tensors = {
        "model.layers.1.mlp.up_proj.old_scale": torch.arange(8).to(torch.float8_e8m0fnu),
        "mtp.proj.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "mtp.rope": torch.randn(3, dtype=torch.complex64),
        "mtp.ids": torch.arange(5).to(torch.uint16),
    }
    add_tensors(model, tensors)
    config = make_config(model=str(model), reconstruction=NEAREST)
    plan(config, with_time=False)
    out = quantize(config)
    source, result = Checkpoint.open(model), Checkpoint.open(out)
    for name, value in tensors.items():
        assert result.infos[name].stored_dtype == source.infos[name].stored_dtype
        assert b"".join(result.raw(result.infos[name])) == value.view(torch.uint8).numpy().tobytes()
    found = check(out, read_data=True)
    assert found.problems == []
    assert check(Path(f"{out}.run"), read_data=True).problems == []


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_fp8_weights_without_scales_are_refused_before_the_run(model, make_config, name):
    shard = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    save_file({**tensors, name: tensors[name].to(torch.float8_e5m2)}, shard)
    config = make_config(model=str(model), reconstruction=NEAREST)
    problem = rf'{shard.name}: tensor "{name}": has dtype F8_E5M2, which is copied but not computed with\. Convert it'
    with pytest.raises(InputError, match=problem):
        quantize(config)
    assert not config.run_path.exists()
    with pytest.raises(InputError, match=problem):
        plan(config, with_time=False)
