"""Checks of a finished model by `cbqstream check`: its tensors, configuration and checksums, and its logits in transformers."""

import json
import re
import shutil
import subprocess
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cbqstream import quantize
from cbqstream.checkpoint.decoders.decoder import Decoder
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.tensors import DerivedTensor, named_piece, piece
from cbqstream.checkpoint.verified import VerifiedCheckpoint
from cbqstream.commands.check import check
from cbqstream.errors import DeviceMemoryError, IdentityError, InputError, StoppedError
from cbqstream.evaluation.model import open_model
from cbqstream.rundir.chain import Chain
from cbqstream.scheme import Scheme
from quantized import store
from tiny import VOCAB

SHARD = "block-00001.safetensors"
LAYER = "model.layers.1.mlp.up_proj"
AGAIN = "Download or copy the model again."


def edit_tensors(folder: Path, edit) -> None:
    """Edit the tensors of the shard of block 1, and list the new names in the index of the checkpoint."""
    tensors = load_file(folder / SHARD)
    edit(tensors)
    (folder / SHARD).unlink()  # the file is a hard link to a file of the run directory, which must not change
    save_file(tensors, folder / SHARD)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != SHARD}
    index["weight_map"] = kept | dict.fromkeys(tensors, SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_quantization_config(folder: Path, edit) -> None:
    """Edit the `quantization_config` in config.json."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def made(make_config):
    """Folder of a model that was rounded to nearest, with asymmetric 4-bit weights in groups of 32."""
    return quantize(
        make_config(scheme=Scheme(num_bits=4, group_size=32, symmetric=False), reconstruction={"rounding": "nearest"})
    )


def test_a_new_result_has_no_problems(made):
    assert check(made, read_data=False).problems == []


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_a_missing_part_of_a_packed_layer_is_reported(made, part):
    edit_tensors(made, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    assert check(made, read_data=False).problems == [f"{made}: {LAYER}: {part} missing. {AGAIN}"]


@pytest.fixture
def made_int8(make_config):
    """Folder of a model that was rounded to nearest, with asymmetric 8-bit weights per channel and 8-bit inputs, which is int-quantized."""
    scheme = Scheme(num_bits=8, group_size=None, activation_bits=8, symmetric=False)
    return quantize(make_config(scheme=scheme, reconstruction={"rounding": "nearest"}))


INT8_FAULTS = [
    ({"weight_scale": None}, "weight_scale missing"),
    ({"weight_zero_point": None}, "weight_zero_point missing"),
    ({"weight_scale": torch.ones(128, 2)}, "weight_scale has shape [128, 2], but 8 bits of [128, 64] need [128, 1]"),
    ({"weight_zero_point": torch.ones(128, dtype=torch.int8)}, "weight_zero_point has shape [128], but 8 bits of"),
    ({"weight_zero_point": torch.ones(128, 1)}, "weight_zero_point has dtype torch.float32, but int-quantized needs"),
    ({"weight": torch.ones(128, 64)}, "weight has dtype torch.float32, but int-quantized needs torch.int8"),
    ({"weight": torch.ones(8192, dtype=torch.int8)}, "weight has 1 dimensions, not two"),
]


def test_damaged_int_quantized_layers_are_reported_and_not_evaluated(made_int8, tmp_path):
    """Codes without scales are not taken for a dense weight, and neither are dense values beside scales."""
    assert check(made_int8, read_data=True).problems == []
    for number, (edit, fault) in enumerate(INT8_FAULTS):

        def change(tensors, edit=edit):
            for part, value in edit.items():
                tensors.pop(f"{LAYER}.{part}")
                tensors.update({} if value is None else {f"{LAYER}.{part}": value})

        copy = Path(shutil.copytree(made_int8, tmp_path / str(number)))
        edit_tensors(copy, change)
        (problem,) = check(copy, read_data=False).problems
        assert problem.startswith(f"{copy}: {LAYER}: {fault}")
        with pytest.raises(InputError, match=re.escape(f'up_proj": {fault}')):
            open_model(copy)[1].read(f"{LAYER}.weight", device=torch.device("cpu"))


def test_int8_codes_that_are_missing_or_of_another_shape_than_the_layer_are_reported(made_int8, tmp_path):
    def transpose(tensors):
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].T.contiguous()
        for part in ("weight_scale", "weight_zero_point"):
            tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"][:64].contiguous()

    copy = Path(shutil.copytree(made_int8, tmp_path / "copy"))
    edit_tensors(copy, transpose)
    edit_tensors(made_int8, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    for folder in (copy, made_int8):
        (problem,) = check(folder, read_data=False).problems
        assert f"{LAYER}.weight" in problem


def test_layers_that_are_not_stored_in_the_format_of_config_json_are_reported(made_int8):
    """Programs that load the model look for tensors by the format of the group, not by what is stored."""
    edit_quantization_config(
        made_int8, lambda config: config["config_groups"]["group_0"].update(format="pack-quantized")
    )
    problems = check(made_int8, read_data=False).problems
    assert len(problems) == 28
    expected = f"{LAYER}: stored as int-quantized, but config.json says pack-quantized. {AGAIN}"
    assert f"{made_int8}: {expected}" in problems


def test_a_weight_shape_that_is_not_two_numbers_is_reported(made):
    """`check` lists the problem, and `open_model` refuses the model."""
    edit_tensors(made, lambda tensors: tensors.update({f"{LAYER}.weight_shape": torch.tensor([128, 64, 1])}))
    assert check(made, read_data=False).problems == [f"{made}: {LAYER}: weight_shape is not two numbers. {AGAIN}"]
    with pytest.raises(InputError, match=r"up_proj\": weight_shape is not two numbers\."):
        open_model(made)


def test_packed_codes_with_half_of_the_columns_are_reported(made):
    def narrow(tensors):
        tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"][:, ::2].contiguous()

    edit_tensors(made, narrow)
    expected = f"{made}: {LAYER}: weight_packed has shape [128, 4], but 4 bits of [128, 64] need [128, 8]. {AGAIN}"
    assert check(made, read_data=False).problems == [expected]


def test_a_wrong_number_of_bits_of_per_channel_weights_is_reported(make_config):
    """All 28 layers are reported, although per-channel scales do not show the number of columns."""
    made = quantize(make_config(scheme=Scheme(num_bits=4, group_size=None), reconstruction={"rounding": "nearest"}))
    edit_quantization_config(made, lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits=2))
    problems = check(made, read_data=False).problems
    assert len(problems) == 28
    assert (
        f"{made}: {LAYER}: weight_packed has shape [128, 8], but 2 bits of [128, 64] need [128, 4]. {AGAIN}" in problems
    )
    with pytest.raises(InputError, match=r"up_proj\": weight_packed has shape \[128, 8\], but 2 bits"):
        open_model(made)[1].read(f"{LAYER}.weight", device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            lambda config: config["config_groups"].update(group_0=["Linear"]),
            "(compressed-tensors), and compressed-tensors cannot read its quantization_config",
        ),
        (
            lambda config: config["config_groups"]["group_0"]["weights"].pop("num_bits"),
            'down_proj.weight_packed": has shape [64, 16], but must have [64, 32].',
        ),
        (lambda config: config.pop("config_groups"), "and its quantization_config has no config_groups."),
    ],
)
def test_a_quantization_config_of_an_unknown_form_is_reported(made, edit, problem):
    edit_quantization_config(made, edit)
    assert problem in check(made, read_data=False).problems[-1]


def test_checksums_of_all_shards_are_compared(made, tmp_path):
    """A changed bit of one code is reported with --read-data, although the changed code is valid too.

    SHA256SUMS has the format of the program sha256sum. Without SHA256SUMS, a result has no problems.
    """
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    assert check(copy, read_data=True).facts[-1].endswith(", 5 shards with the checksums of SHA256SUMS")
    known = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=copy, check=False)
    assert known.returncode == 0
    tensors = load_file(copy / SHARD)
    tensors[f"{LAYER}.weight_packed"][3, 2] ^= 1
    save_file(tensors, copy / SHARD, metadata={"format": "pt"})
    assert check(copy, read_data=False).problems == []
    expected = f"{copy / SHARD}: is not what was written (its SHA-256 does not match SHA256SUMS). Copy it again."
    assert check(copy, read_data=True).problems == [expected]
    (copy / "SHA256SUMS").write_text("nonsense\n")
    assert check(copy, read_data=True).problems == [
        f"{copy / 'SHA256SUMS'}: not a list of checksums. Remove it, or copy it again."
    ]
    (copy / "SHA256SUMS").unlink()
    assert check(copy, read_data=True).problems == []


def test_checksums_of_a_result_are_compared_when_its_run_directory_is_checked(made):
    """The shards of the result are the files of the run directory. `check` reads each file once, and still compares SHA256SUMS."""
    sums = made / "SHA256SUMS"
    text = sums.read_text()
    shard = next(line for line in text.splitlines() if line.endswith(SHARD))
    run = made.with_name(f"{made.name}.run")
    assert check(run, read_data=True).problems == []
    sums.write_text(text.replace(shard, f"{64 * '0'}  {SHARD}"))
    expected = f"{made / SHARD}: is not what was written (its SHA-256 does not match SHA256SUMS). Copy it again."
    assert check(run, read_data=True).problems == [expected]


def test_layers_that_inference_engines_fuse_must_have_one_scheme(made):
    """mlp.gate_proj is quantized and mlp.up_proj is not."""

    def whole(tensors):
        for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
            tensors.pop(f"{LAYER}.{part}")
        tensors[f"{LAYER}.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)

    edit_tensors(made, whole)
    expected = f"{made}: model.layers.1: inference engines compute mlp.gate_proj and mlp.up_proj as one layer, but their schemes differ."
    assert check(made, read_data=False).problems == [expected]


def test_a_quantization_config_that_compressed_tensors_refuses_is_reported(made):
    edit_quantization_config(made, lambda config: config.update(quantization_status="packed up"))
    (problem,) = check(made, read_data=False).problems
    assert problem.startswith(f"{made}: compressed-tensors cannot read the quantization_config: ")


@pytest.mark.parametrize(("symmetric", "expected"), [(True, ": logits"), (False, " with dequantize=True: logits")])
def test_transformers_loads_a_result_with_the_logits_of_the_streamed_evaluation(
    make_config, capfd, symmetric, expected
):
    """Logits agree within 1e-5, also for asymmetric weights, which transformers dequantizes to bfloat16.

    Nothing is printed while the model is loaded.
    """
    scheme = Scheme(num_bits=4, group_size=32, symmetric=symmetric)
    out = quantize(make_config(scheme=scheme, reconstruction={"rounding": "nearest"}))
    capfd.readouterr()
    found = check(out, read_data=False, load=True)
    assert capfd.readouterr() == ("", "")
    assert found.problems == []
    assert f"loads it as LlamaForCausalLM{expected}" in found.facts[-1]
    assert found.facts[-1].endswith("same next token after 32 of 32")
    assert float(re.search(r"within (\S+) of", found.facts[-1])[1]) < 1e-5


def test_a_result_that_transformers_fails_to_load_is_reported(made, monkeypatch):
    def fail(*_, **__):
        raise KeyError("no such layer\nand more")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    (problem,) = check(made, read_data=False, load=True).problems
    assert re.fullmatch(rf"{made}: transformers \S+ cannot load it: 'no such layer.*", problem)
    assert check(made, read_data=False).problems == []


def test_other_logits_in_transformers_are_reported(made, monkeypatch):
    """transformers gives other logits if it does not find a tensor: it fills the parameter with random values and only warns."""

    class RandomLogits(torch.nn.Module):
        def forward(self, ids, **_):
            generator = torch.Generator().manual_seed(0)
            return SimpleNamespace(logits=100 * torch.randn(1, ids.shape[1], VOCAB, generator=generator))

    info = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: (RandomLogits(), info))
    (problem,) = check(made, read_data=False, load=True).problems
    assert problem.startswith(f"{made}: its logits in transformers differ from the streamed ones. transformers ")


@pytest.mark.parametrize(
    ("scheme", "problems"),
    [(Scheme(num_bits=4, group_size=32), 1), (Scheme(num_bits=4, group_size=32, activation_bits=8), 0)],
)
def test_logits_in_transformers_that_are_5_percent_larger_are_a_problem_only_of_unquantized_inputs(
    make_config, monkeypatch, scheme, problems
):
    """Quantized inputs allow larger differences, because a small difference can round an input to the next code."""
    made = quantize(make_config(scheme=scheme, reconstruction={"rounding": "nearest"}))
    load = LlamaForCausalLM.from_pretrained

    def load_with_larger_logits(*args, **options):
        model, info = load(*args, **options)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.05)
        return model, info

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load_with_larger_logits)
    assert len(check(made, read_data=False, load=True).problems) == problems


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_to_load_a_model_is_an_error_and_not_a_problem_of_the_model(made, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(DeviceMemoryError, match=r"the whole model does not fit in memory\. Leave out --load"):
        check(made, read_data=False, load=True)


def test_load_reports_that_an_unfinished_run_has_no_result(make_config):
    config = make_config(reconstruction={"rounding": "nearest"})
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=1)
    found = check(Path(f"{config.out}.run"), read_data=False, load=True)
    assert found.problems == []
    assert found.facts[-1] == "result: not finished yet, so nothing was loaded"


def test_pieces_of_a_source_are_read_again(tmp_path):
    """A run that read one expert of a fused tensor recorded the digest of that piece."""
    save_file({"experts": torch.arange(12.0).reshape(3, 2, 2)}, tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")
    source = VerifiedCheckpoint({"one": piece(stored["experts"], 1)}, stored)
    source.read("one", device=torch.device("cpu"))
    digests = source.take_digests()
    assert list(digests) == ["experts[1]"]
    names = [*digests, "experts[3]", "experts", "others[0]"]
    pieces = {name: found for name in names if (found := named_piece(stored, name)) is not None}
    assert list(pieces) == ["experts[1]", "experts"]
    assert pieces["experts"] is stored["experts"]
    again = VerifiedCheckpoint(pieces, stored)
    again.remember(digests)
    assert b"".join(again.raw(pieces["experts[1]"])) == torch.arange(4.0, 8.0).numpy().tobytes()
    again.remember({"experts[1]": "another"})
    with pytest.raises(IdentityError, match=r'tensor "experts\[1\]" is not what this run read before'):
        deque(again.raw(pieces["experts[1]"]), maxlen=0)


def half_of(name, parts):
    """A weight of a made-up format: every stored value is half of it."""
    half = parts["half"]
    return DerivedTensor(name, half.dtype, half.shape, parts, lambda values: 2 * values["half"], piecewise=True)


def test_a_model_of_a_registered_source_format_is_checked(tiny_models, tmp_path, monkeypatch):
    """One row of `DECODERS` is enough, and all tensors are read through it."""
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "halves")
    store(folder, lambda weight: {"weight_half": weight / 2}, {"quant_method": "halves"})
    refused = f"{folder}/config.json: the model is already quantized (halves), which is not decoded"
    assert [problem.startswith(refused) for problem in check(folder, read_data=True).problems] == [True]

    halves = Decoder("half", {"_half": ("", "half")}, lambda quantized: half_of)
    monkeypatch.setattr("cbqstream.checkpoint.decoding.DECODERS", {"halves": halves})
    found = check(folder, read_data=True)
    assert found.problems == []
    assert "all finite" in found.facts[-1]
    name, device = "model.layers.0.mlp.up_proj.weight", torch.device("cpu")
    _, original = open_model(tiny_models["llama"])
    assert torch.equal(open_model(folder)[1].read(name, device=device), original.read(name, device=device))


def test_streams_that_the_run_deletes_during_the_check_are_not_called_damaged(make_config, monkeypatch):
    """`check` reads the records of a run just before the run commits another window and deletes the streams of the one before."""
    config = make_config(reconstruction={"epochs": 1})
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=2)
    now = Chain.read(config.run_path)
    read = iter([now.shortened(1), now])
    monkeypatch.setattr(Chain, "read", lambda path: next(read))
    found = check(config.run_path, read_data=True)
    assert found.problems == []
    assert "streams: not checked, because the run committed a window during the check" in found.facts
