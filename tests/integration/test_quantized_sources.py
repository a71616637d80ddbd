"""Sources that other programs quantized, from plan to the finished model: they are treated as the same model, decoded to disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cbqstream import evaluate, plan, quantize
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.cli.main import app
from cbqstream.commands.check import check
from cbqstream.commands.export import export
from cbqstream.errors import InputError, UsageError
from cbqstream.evaluation.model import open_model
from cbqstream.packed.packed_checkpoint import PackedCheckpoint
from cbqstream.records import RunWarning
from quantized import awq, compressed, fp8, gptq, modelopt_nvfp4, store
from tiny import SEQ_LEN, files_of

CPU = torch.device("cpu")
NEAREST = {"rounding": "nearest"}
_FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
_INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
_MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}


def ct(format_name, **weights):
    plain = {key: str(value) if isinstance(value, torch.dtype) else value for key, value in weights.items()}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": plain, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": group}}


SOURCES = {
    "fp8": (lambda weight: fp8(weight, (48, 40)), {"quant_method": "fp8", "weight_block_size": [48, 40]}),
    "fp8 per tensor": (
        lambda weight: {
            "weight": weight.mul(99).to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.tensor(1 / 99),
            "activation_scale": torch.tensor(1.0),
        },
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    ),
    "float-quantized": (
        lambda weight: compressed(weight, "float-quantized", **_FLOAT8),
        ct("float-quantized", **_FLOAT8),
    ),
    "pack-quantized": (lambda weight: compressed(weight, "pack-quantized", **_INT4), ct("pack-quantized", **_INT4)),
    "mxfp4": (
        lambda weight: compressed(weight, "mxfp4-pack-quantized", **_MXFP4),
        ct("mxfp4-pack-quantized", **_MXFP4),
    ),
    "modelopt": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "gptq": (
        lambda weight: gptq(weight, symmetric=False, shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
}
"""How a layer is stored, and the quantization_config."""


@pytest.fixture(params=SOURCES)
def source(request, tiny_models, tmp_path) -> Path:
    """A tiny Llama in several shards that another program quantized."""
    folder = Path(shutil.copytree(tiny_models["llama"], tmp_path / "source"))
    return store(folder, *SOURCES[request.param])


def test_a_quantized_source_is_the_same_model_decoded(source, make_config, tokens, tmp_path):
    """The plan says what is read, and eval and quantize give what they give for the dense model that `export` writes."""
    dense = export(source, tmp_path / "dense", "dense")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    stored = Checkpoint.open(dense)
    _, decoded = open_model(source)
    assert not isinstance(decoded, PackedCheckpoint)
    assert decoded.tensors() == stored.tensors()
    assert all(torch.equal(decoded.read(name, device=CPU), stored.read(name, device=CPU)) for name in stored.infos)
    options = {"num_samples": 4, "seq_len": SEQ_LEN, "device": "cpu", "threads": 1}
    assert evaluate(source, tokens, **options) == evaluate(dense, tokens, **options)
    assert check(source, read_data=True).problems == []

    config = make_config(model=str(source), reconstruction=NEAREST)
    planned, of_dense = (plan(make_config(model=str(one)), with_time=False) for one in (source, dense))
    assert planned.source < of_dense.source
    assert planned.bytes_read < of_dense.bytes_read
    assert planned.ram["weights"] == of_dense.ram["weights"]
    assert planned.disk == of_dense.disk
    assert "decoding" in planned.ram
    assert "decoding" not in of_dense.ram
    quantized = [warning for warning in planned.warnings if "quantized already" in warning]
    assert quantized == [
        f"{source}: 28 of its 39 tensors are quantized already. They are decoded as they are read; what they lost is not restored."
    ]
    said = []
    out = quantize(config, listener=said.append, stop_after_window=None)
    assert RunWarning(quantized[0]) in said
    other = quantize(make_config(name="other", model=str(dense), reconstruction=NEAREST))
    made, expected = files_of(Path(out)), files_of(Path(other))
    assert {name: made[name] for name in made if name.endswith((".safetensors", "config.json"))} == {
        name: expected[name] for name in expected if name.endswith((".safetensors", "config.json"))
    }
    assert check(Path(f"{out}.run"), read_data=True).problems == []


def test_layers_that_stay_in_full_precision_are_written_dense(tiny_models, make_config, tmp_path):
    """No part and no description of the old quantization is left, and `ignore` names the decoded layers."""
    folder = store(Path(shutil.copytree(tiny_models["llama"], tmp_path / "source")), *SOURCES["modelopt"])
    config = json.loads((folder / "config.json").read_text())
    described = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps({**config, "extra_config": {"compression_config": described}}))
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        (folder / name).write_text(json.dumps({"quantization": described}))
    _, decoded = open_model(folder)
    out = Path(quantize(make_config(model=str(folder), reconstruction=NEAREST, keep_first=1, ignore=("o_proj",))))
    made = {name: value for shard in out.glob("*.safetensors") for name, value in load_file(shard).items()}
    kept = ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.o_proj"]
    for layer in kept:
        assert torch.equal(made[f"{layer}.weight"], decoded.read(f"{layer}.weight", device=CPU))
        assert made[f"{layer}.weight"].dtype == torch.bfloat16
    assert not any(name.endswith(("input_scale", "weight_scale_2")) for name in made)
    assert not [path.name for path in out.iterdir() if "quant" in path.name]
    new = json.loads((out / "config.json").read_text())
    assert new["extra_config"] == {}
    assert kept[0] in new["quantization_config"]["ignore"]
    assert check(out, read_data=True, load=True).problems == []


def test_a_model_whose_text_model_is_quantized_is_read(tiny_models, make_config, tmp_path):
    """The description may stand in `text_config`, as in Kimi K2.5."""
    folder = store(Path(shutil.copytree(tiny_models["gemma3"], tmp_path / "source")), *SOURCES["fp8"])
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    out = Path(quantize(make_config(model=str(folder), reconstruction=NEAREST)))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())["text_config"]
    assert check(out, read_data=True).problems == []


def test_only_dense_is_exported(tiny_models, tmp_path):
    folder = store(Path(shutil.copytree(tiny_models["llama"], tmp_path / "source")), *SOURCES["fp8"])
    with pytest.raises(UsageError, match=r"already quantized \(fp8\) in a form that is not supported"):
        export(folder, tmp_path / "out", "gptq")
    with pytest.raises(InputError, match=r"the model is not quantized\. Give a result"):
        export(tiny_models["llama"], tmp_path / "out", "dense")


@pytest.mark.parametrize("case", ["fp8", "gptq"])
def test_eval_says_that_inputs_are_not_quantized(case, tiny_models, tokens, tmp_path, capsys):
    folder = store(Path(shutil.copytree(tiny_models["llama"], tmp_path / "source")), *SOURCES[case])
    size = ("--num-samples", "2", "--seq-len", str(SEQ_LEN), "--device", "cpu")
    app(["eval", str(folder), "--text", str(tokens), *size], standalone_mode=False)
    said = (
        f"warning: {folder}: inference engines also quantize the inputs of its layers; only its weights were evaluated."
    )
    assert (said in capsys.readouterr().out.replace("\n", " ").strip()) == (case == "fp8")
