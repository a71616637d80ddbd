"""`check OUT`: what is wrong with a result is found without reading its data."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cbqstream import quantize
from cbqstream.commands.check import check
from cbqstream.errors import DeviceMemoryError, InputError, StoppedError
from cbqstream.evaluation.model import open_model
from cbqstream.scheme import Scheme
from tiny import VOCAB

SHARD = "block-00001.safetensors"
LAYER = "model.layers.1.mlp.up_proj"


def change(folder: Path, edit) -> None:
    """Edit the tensors of a block, in a file of its own, and the index with them."""
    tensors = load_file(folder / SHARD)
    edit(tensors)
    (folder / SHARD).unlink()  # it is linked to the run
    save_file(tensors, folder / SHARD)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != SHARD}
    index["weight_map"] = kept | dict.fromkeys(tensors, SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def made(make_config):
    return quantize(
        make_config(scheme=Scheme(num_bits=4, group_size=32, symmetric=False), reconstruction={"rounding": "nearest"})
    )


def test_a_good_result(made):
    assert check(made, read_data=False).problems == []


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_a_part_is_missing(made, part):
    change(made, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    assert check(made, read_data=False).problems == [f"{made}: {LAYER}: {part} missing."]


def test_a_shape_that_is_none(made):
    change(made, lambda tensors: tensors.update({f"{LAYER}.weight_shape": torch.tensor([128, 64, 1])}))
    assert check(made, read_data=False).problems == [f"{made}: {LAYER}: weight_shape is not two numbers."]
    with pytest.raises(InputError, match=r"up_proj\": weight_shape is not two numbers\."):
        open_model(made)


def test_codes_of_another_width(made):
    def narrow(tensors):
        tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"][:, ::2].contiguous()

    change(made, narrow)
    expected = f"{made}: {LAYER}: weight_packed is [128, 4], [128, 8] belong to 4 bits of [128, 64]."
    assert check(made, read_data=False).problems == [expected]


def test_codes_of_another_width_per_channel(make_config):
    """Where no scale says how many columns there are."""
    made = quantize(make_config(scheme=Scheme(num_bits=4, group_size=None), reconstruction={"rounding": "nearest"}))
    edit_config(made, lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits=2))
    problems = check(made, read_data=False).problems
    assert len(problems) == 28
    assert f"{made}: {LAYER}: weight_packed is [128, 8], [128, 4] belong to 2 bits of [128, 64]." in problems
    with pytest.raises(InputError, match=r"up_proj\": weight_packed is \[128, 8\], not \[128, 4\]\."):
        open_model(made)[1].read(f"{LAYER}.weight", device=torch.device("cpu"))


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config["config_groups"].update(group_0=["Linear"]),
        lambda config: config["config_groups"]["group_0"]["weights"].pop("num_bits"),
        lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits="4"),
        lambda config: config.pop("config_groups"),
    ],
)
def test_a_config_of_another_form(made, edit):
    edit_config(made, edit)
    assert (
        "already quantized (compressed-tensors) in a form that is not read here."
        in check(made, read_data=False).problems[-1]
    )


def test_every_byte_of_a_result_is_compared(made, tmp_path):
    """One bit of one code, which is as good a code as any other."""
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    assert check(copy, read_data=True).facts[-1].endswith(", 5 shards with the checksums of SHA256SUMS")
    known = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=copy, check=False)
    assert known.returncode == 0
    tensors = load_file(copy / SHARD)
    tensors[f"{LAYER}.weight_packed"][3, 2] ^= 1
    save_file(tensors, copy / SHARD, metadata={"format": "pt"})
    assert check(copy, read_data=False).problems == []
    expected = f"{copy / SHARD}: is not what was written (by its SHA-256 in SHA256SUMS). Copy it again."
    assert check(copy, read_data=True).problems == [expected]
    (copy / "SHA256SUMS").write_text("nonsense\n")
    assert check(copy, read_data=True).problems == [
        f"{copy / 'SHA256SUMS'}: not a list of checksums. Remove it, or copy it again."
    ]
    (copy / "SHA256SUMS").unlink()
    assert check(copy, read_data=True).problems == []


def test_checksums_of_a_result_beside_its_run(made):
    """Shards that are those of the run were read as parts of it; their checksums are still compared."""
    sums = made / "SHA256SUMS"
    text = sums.read_text()
    shard = next(line for line in text.splitlines() if line.endswith(SHARD))
    run = made.with_name(f"{made.name}.run")
    assert check(run, read_data=True).problems == []
    sums.write_text(text.replace(shard, f"{64 * '0'}  {SHARD}"))
    expected = f"{made / SHARD}: is not what was written (by its SHA-256 in SHA256SUMS). Copy it again."
    assert check(run, read_data=True).problems == [expected]


def test_a_layer_that_its_neighbors_are_not(made):
    def whole(tensors):
        for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
            tensors.pop(f"{LAYER}.{part}")
        tensors[f"{LAYER}.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)

    change(made, whole)
    expected = f"{made}: model.layers.1: mlp.gate_proj and mlp.up_proj are computed as one by inference engines and have other schemes."
    assert check(made, read_data=False).problems == [expected]


def test_a_config_that_compressed_tensors_does_not_read(made):
    edit_config(made, lambda config: config.update(quantization_status="packed up"))
    (problem,) = check(made, read_data=False).problems
    assert problem.startswith(f"{made}: quantization_config is not read by compressed-tensors: ")


@pytest.mark.parametrize(
    ("symmetric", "said"), [(True, "loads it: logits"), (False, "loads it, asked to dequantize it: logits")]
)
def test_loaded_by_transformers(make_config, capfd, symmetric, said):
    """Near the streamed model; transformers makes bf16 weights where it dequantizes."""
    scheme = Scheme(num_bits=4, group_size=32, symmetric=symmetric)
    out = quantize(make_config(scheme=scheme, reconstruction={"rounding": "nearest"}))
    capfd.readouterr()
    found = check(out, read_data=False, load=True)
    assert capfd.readouterr() == ("", "")
    assert found.problems == []
    assert said in found.facts[-1]
    assert found.facts[-1].endswith("same next token after 16 of 16")
    assert float(re.search(r"within (\S+) of", found.facts[-1])[1]) < (1e-5 if symmetric else 1e-2)


def test_not_loaded_by_transformers(made, monkeypatch):
    def fail(*_, **__):
        raise KeyError("no such layer\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    (problem,) = check(made, read_data=False, load=True).problems
    assert re.fullmatch(rf"{made}: transformers \S+ does not load it: 'no such layer.*", problem)
    assert check(made, read_data=False).problems == []


def test_another_model_in_transformers(made, monkeypatch):
    """As where it does not find a tensor, starts it at random, and only warns."""

    class Strange(torch.nn.Module):
        def forward(self, ids, **_):
            generator = torch.Generator().manual_seed(0)
            return SimpleNamespace(logits=100 * torch.randn(1, ids.shape[1], VOCAB, generator=generator))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: Strange())
    (problem,) = check(made, read_data=False, load=True).problems
    assert problem.startswith(f"{made}: is another model in transformers. transformers ")


@pytest.mark.parametrize(
    ("scheme", "problems"),
    [(Scheme(num_bits=4, group_size=32), 1), (Scheme(num_bits=4, group_size=32, activation_bits=8), 0)],
)
def test_how_near_transformers_must_be(make_config, monkeypatch, scheme, problems):
    """A twentieth off is another model, unless inputs are rounded."""
    made = quantize(make_config(scheme=scheme, reconstruction={"rounding": "nearest"}))
    load = AutoModelForCausalLM.from_pretrained

    def louder(*args, **options):
        model = load(*args, **options)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.05)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", louder)
    assert len(check(made, read_data=False, load=True).problems) == problems


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_says_nothing_about_the_model(made, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(DeviceMemoryError, match=r"does not fit in memory as a whole\. Leave out --load"):
        check(made, read_data=False, load=True)


def test_an_unfinished_run_is_not_loaded(make_config):
    config = make_config(reconstruction={"rounding": "nearest"})
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=1)
    found = check(Path(f"{config.out}.run"), read_data=False, load=True)
    assert found.problems == []
    assert found.facts[-1] == "result: there is none yet, so nothing was loaded"
