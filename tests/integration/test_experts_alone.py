"""Routed experts that are reconstructed alone: their sums, the results, interruptions, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbqstream import quantize
from cbqstream.activations.memory_store import MemoryStore
from cbqstream.activations.store import StreamShape
from cbqstream.checkpoint.folder import find_tensors
from cbqstream.checkpoint.header import read_header
from cbqstream.commands.check import check
from cbqstream.config import WindowConfig
from cbqstream.errors import IdentityError, StoppedError, UsageError
from cbqstream.models.block import run_block
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.planning.alternatives import smaller_settings
from cbqstream.planning.plan import plan
from cbqstream.planning.sizes import ModelSizes
from cbqstream.records import MemoryMode, RunNotice, RunWarning, WindowReport
from cbqstream.report.status import status_lines
from cbqstream.run import expert_groups, inputs
from cbqstream.run.experts_alone import route_and_sum
from cbqstream.run.finished import computing_block
from cbqstream.run.inputs import open_inputs
from cbqstream.rundir.chain import Chain
from cbqstream.rundir.partial import PARTIAL
from cbqstream.scheme import Scheme
from cbqstream.windows.expert_reconstruction import ExpertInputs
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.read_block import with_experts
from cbqstream.windows.resident_block import ResidentBlock, run_blocks
from tiny import files_of, save_model

CPU = torch.device("cpu")
ONE = WindowConfig(size=1, overlap=0)


@pytest.fixture
def alone(make_config):
    """A function that makes the settings of a run with experts alone."""

    def make(family="mixtral", *, reconstruction=None, window=ONE, **options):
        settings = {"epochs": 2, **(reconstruction or {}), "experts": "alone"}
        return make_config(family, window=window, reconstruction=settings, **options)

    return make


@pytest.fixture
def small_groups(monkeypatch):
    """Every expert is a group of its own."""
    monkeypatch.setattr(expert_groups, "SLAB_WEIGHTS", 1)


@pytest.fixture
def reconstructed(monkeypatch):
    """Numbers of the experts that were reconstructed, in order."""
    numbers, real = [], ExpertInputs.reconstruct

    def count(self, number, *more):
        numbers.append(number)
        return real(self, number, *more)

    monkeypatch.setattr(ExpertInputs, "reconstruct", count)
    return numbers


class KilledError(Exception):
    """Raised in place of a signal."""


def killed_at(text):
    """A listener that stops the run when it begins a step whose description contains `text`."""

    def listen(event):
        if isinstance(event, str) and text in event:
            raise KilledError

    return listen


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_sums_of_experts_give_the_output_of_the_block(family, alone, make_config):
    """A block that gets the sums of its experts computes the same as a block with its experts, to the precision of bf16."""
    opened, whole = (open_inputs(config, CPU, 1) for config in (alone(family), make_config(family)))
    with load_embedding_and_head(opened.meta_model, opened.source, device=CPU, dtype=torch.float32) as outer:
        arguments = outer.block_arguments(opened.tokens[0])
    stream = MemoryStore(StreamShape(*opened.stream_shape))
    x_NSD = torch.randn(opened.stream_shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for segment, x_SD in enumerate(x_NSD):
        stream.write(segment, x_SD)
    index = 2
    module = computing_block(opened, index, opened.source)
    experts = with_experts(module, opened.meta_model.blocks[index], opened.experts_alone(index))
    block = ResidentBlock(index, module, arguments[index], experts=experts)
    with torch.no_grad():
        route_and_sum(opened, block, stream, opened.source, None)
        sums = torch.stack([stream.beside[experts.key].store.read(segment) for segment in range(len(x_NSD))])
        found = run_blocks([block], x_NSD.float(), Phase.ORIGINAL, {experts.key: sums})
        expected = run_block(computing_block(whole, index, whole.source), x_NSD.float(), arguments[index])
    assert sums.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * (expected - x_NSD.float()).abs().max().item())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_all_layers_of_experts_are_quantized_and_load(family, alone):
    events = []
    out = quantize(alone(family), events.append)
    assert check(out, read_data=True, load=True).problems == []
    reports = [event for event in events if isinstance(event, WindowReport)]
    number = len(next(iter(reports[-1].experts.values())))
    assert len([name for name in reports[-1].sqnr_db if ".experts." in name]) == 3 * number
    assert any(report.changed > 0 for report in reports)
    notices = [
        event.text for event in events if isinstance(event, RunNotice) and f"{number} experts alone" in event.text
    ]
    assert len(notices) == (3 if family == "deepseek_v3" else 4)  # the first block of DeepSeek is dense


def test_training_lowers_the_loss_of_the_experts(alone):
    """On held-out tokens, the loss of a block with one more expert replaced is lower if the expert was trained."""
    config = alone(scheme=Scheme(num_bits=2, group_size=32), reconstruction={"epochs": 12})
    texts = []
    quantize(config, lambda event: texts.append(event.text) if isinstance(event, RunNotice) else None)
    losses = [text.partition("mean loss ")[2].partition(",")[0].split(" -> ") for text in texts if "mean loss" in text]
    assert len(losses) == 4
    assert sum(float(after) for _, after in losses) < 0.99 * sum(float(before) for before, _ in losses), texts


def test_results_do_not_depend_on_where_tokens_are_kept(alone, monkeypatch):
    """A run with the inputs and sums of the experts in a file, stopped and resumed, gives the bytes of a run that has them in memory."""
    plain = files_of(quantize(alone(name="plain")))
    real_plan = inputs.fitting_plan
    mode = MemoryMode(activation_checkpointing=True, offload=True, expert_inputs_on_disk=True, streams_on_disk=True)
    monkeypatch.setattr(inputs, "fitting_plan", lambda *given: replace(real_plan(*given), memory_mode=mode))
    config = alone(name="offloaded")
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=1)
    assert files_of(quantize(config)) == plain


@pytest.mark.usefixtures("small_groups")
def test_a_run_killed_between_experts_loses_none(alone, reconstructed):
    """A run that is stopped in the second window before its third expert computes each expert once, and gives the same bytes."""
    plain = files_of(quantize(alone(name="plain")))
    whole = [*reconstructed]
    reconstructed.clear()
    config = alone()
    windows = []

    def second_window(event):
        if isinstance(event, WindowReport):
            windows.append(event.index)
        if windows and isinstance(event, str) and "experts 2-2" in event:
            raise KilledError

    with pytest.raises(KilledError):
        quantize(config, second_window)
    assert sorted(path.name for path in Path(f"{config.out}.run", PARTIAL).iterdir()) == [
        f"{name}.{kind}" for name in ("dense", "experts-00000", "experts-00001") for kind in ("json", "safetensors")
    ]
    chain = Chain.read(Path(f"{config.out}.run"))
    assert "repeated, except for 2 experts that are finished. To resume:" in status_lines(chain)[-1]
    assert files_of(quantize(config)) == plain
    assert reconstructed == whole
    assert not Path(f"{config.out}.run", PARTIAL).exists()


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("damage", ["tensors", "record", "missing record", "other commit"])
def test_damaged_results_inside_a_window_are_computed_again(alone, reconstructed, damage):
    plain = files_of(quantize(alone(name="plain")))
    config = alone()
    with pytest.raises(KilledError):
        quantize(config, killed_at("window 1/4 blocks 0-0: experts 2-2"))
    reconstructed.clear()
    folder = Path(f"{config.out}.run", PARTIAL)
    tensors, record = folder / "experts-00001.safetensors", folder / "experts-00001.json"
    match damage:
        case "tensors":
            content = bytearray(tensors.read_bytes())
            content[-1] ^= 1
            tensors.write_bytes(content)
        case "record":
            record.write_text(record.read_text().replace('"before":', '"after":', 1))
        case "missing record":
            record.unlink()
        case "other commit":
            with pytest.raises(KilledError):
                quantize(alone(name="other", seed=1), killed_at("window 1/4 blocks 0-0: experts 2-2"))
            reconstructed.clear()
            shutil.copytree(Path(f"{alone(name='other').out}.run", PARTIAL), folder, dirs_exist_ok=True)
    assert files_of(quantize(config)) == plain
    first = reconstructed[: reconstructed.index(3) + 1]
    assert first == ([0, 1, 2, 3] if damage == "other commit" else [1, 2, 3])


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_lost_streams_are_recomputed_with_experts_alone(alone, bits):
    """The inputs of experts are quantized once, as in the run, which compares the streams with the committed ones."""
    scheme = Scheme(num_bits=4, group_size=32, activation_bits=bits)
    plain = files_of(quantize(alone(name="plain", scheme=scheme)))
    config = alone(scheme=scheme)
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=2)
    run = Path(f"{config.out}.run")
    shutil.rmtree(run / "acts" / "00002")
    assert files_of(quantize(config)) == plain
    assert Chain.read(run).is_complete


def test_undersampled_experts_are_named_and_rounded_to_nearest(alone):
    events = []
    quantize(alone("qwen2_moe", num_samples=8), events.append)
    texts = [event.text for event in events if isinstance(event, RunWarning) and "rounded to nearest" in event.text]
    assert texts
    assert all("mlp.experts." in text for text in texts)


def test_experts_in_full_precision_are_copied(alone, tiny_models, reconstructed):
    """The experts of the first block stay in full precision, and are not reconstructed."""
    out = quantize(alone("qwen3_moe", ignore=("layers.0.mlp.experts.*.*",)))
    stored = {name for path in out.glob("*.safetensors") for name in read_header(path)}
    source = {name for name in find_tensors(tiny_models["qwen3_moe"]) if ".experts." in name}
    assert {name for name in source if ".layers.0." in name} == {name for name in source if name in stored}
    number = len({name.split(".")[5] for name in source})
    assert reconstructed == 3 * [*range(number)]


def test_all_tokens_may_give_the_starting_scales(alone):
    """With --calibrate-all-experts, no expert changes its tokens, and the grids of some layers are others."""
    ways = [quantize(alone(name=f"out-{every}", all_experts=every)) for every in (False, True)]
    one, two = (json.loads((out / "config.json").read_text()) for out in ways)
    assert one == two
    assert files_of(ways[0]) != files_of(ways[1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"family": "llama"}, "has no routed experts. Leave out --experts alone."),
        (
            {"window": WindowConfig(size=2, overlap=1)},
            "--experts alone needs windows of one block. Use --window-size 1 --overlap 0.",
        ),
        ({"reconstruction": {"kl_weight": 0.1}}, "Use --kl-weight 0."),
        ({"reconstruction": {"end_to_end_epochs": 1}}, "Use --end-to-end-epochs 0."),
    ],
)
def test_settings_that_do_not_fit_are_refused(alone, options, text):
    config = alone(**options)
    for command in (quantize, lambda settings: plan(settings, with_time=False)):
        with pytest.raises(UsageError) as caught:
            command(config)
        assert text in str(caught.value)
    assert not Path(f"{config.out}.run").exists()


def test_experts_that_get_sorted_inputs_are_refused(alone, make_config, tmp_path):
    """The experts of Llama 4 get their tokens scaled and sorted, which is not supported. A plan does not advise it."""
    folder = save_model(tmp_path / "m", "llama4_text", like="mixtral", moe_layers=[0, 1, 2, 3], head_dim=16)
    with pytest.raises(UsageError, match=r"its experts cannot be computed one at a time\. Use --experts window\."):
        quantize(alone(model=folder))
    config = make_config(model=folder)
    assert not [
        flags
        for flags in smaller_settings(config, ModelSizes.of(open_inputs(config, CPU, 1).meta_model))
        if "alone" in flags
    ]


def test_an_expert_that_no_token_chooses_is_rounded_to_nearest(alone, tiny_models, tmp_path, reconstructed):
    """The router of one block never chooses its first expert, whose scales are found from a sample of all tokens."""
    folder = Path(shutil.copytree(tiny_models["deepseek_v3"], tmp_path / "model"))
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][0] = -1e4
            save_file(tensors, path, metadata={"format": "pt"})
    events = []
    out = quantize(alone(model=folder), events.append)
    report = [event for event in events if isinstance(event, WindowReport)][2]
    assert report.experts["model.layers.2.mlp.experts"][0] == 0
    assert {f"model.layers.2.mlp.experts.0.{layer}_proj" for layer in ("gate", "up", "down")} <= {*report.undersampled}
    assert min(value for name, value in report.sqnr_db.items() if ".experts.0." in name) > 15
    assert check(out, read_data=True).problems == []


def test_codes_of_experts_in_closed_form(alone, reconstructed):
    """With gptq, the codes of experts are computed from the tokens of each, and their loss is lower than that of the nearest ones."""
    texts = []
    config = alone(reconstruction={"rounding": "gptq"}, scheme=Scheme(num_bits=3, group_size=32))
    out = quantize(config, lambda event: texts.append(event.text) if isinstance(event, RunNotice) else None)
    losses = [text.partition("mean loss ")[2].partition(",")[0].split(" -> ") for text in texts if "mean loss" in text]
    assert sum(float(after) for _, after in losses) < 0.95 * sum(float(before) for before, _ in losses), texts
    assert len(reconstructed) == 16
    assert check(out, read_data=True).problems == []


def test_a_resumed_run_reports_the_tokens_of_each_expert(make_config, alone, tmp_path):
    """A group of more than ten experts is finished by a process that is stopped behind it."""
    folder = save_model(tmp_path / "m", "qwen3_moe", num_experts=12, num_experts_per_tok=2)
    plain = files_of(quantize(alone(model=folder, name="plain")))
    config = alone(model=folder)
    with pytest.raises(KilledError):
        quantize(config, killed_at("window 1/4 blocks 0-0: writing"))
    assert files_of(quantize(config)) == plain
    assert "metrics.jsonl" in plain


def test_only_the_experts_may_be_quantized(alone, reconstructed):
    out = quantize(alone("qwen3_moe", ignore=("self_attn.*",)))
    assert reconstructed
    assert check(out, read_data=True).problems == []


def test_an_expert_may_get_only_tokens_that_the_loss_leaves_out(alone):
    """With --robust-tokens of almost all tokens, many experts learn from no token of a batch."""
    events = []
    quantize(alone("qwen2_moe", reconstruction={"robust_tokens": 15}), events.append)
    reports = [event for event in events if isinstance(event, WindowReport)]
    assert len(reports) == 4
    texts = [event.text for event in events if isinstance(event, RunNotice)]
    assert not any("nan" in text for text in texts)


@pytest.mark.usefixtures("small_groups")
def test_a_source_that_changed_behind_a_finished_expert_is_refused(alone, tiny_models, tmp_path):
    """The weights of an expert that an interrupted process finished must be what it read."""
    folder = Path(shutil.copytree(tiny_models["qwen3_moe"], tmp_path / "model"))
    config = alone(model=folder)
    with pytest.raises(KilledError):
        quantize(config, killed_at("window 1/4 blocks 0-0: experts 2-2"))
    record = Path(f"{config.out}.run", PARTIAL, "experts-00000.json")
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in json.loads(record.read_text())["facts"]["source"]
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if "layers.0.mlp.experts.0.up_proj" in name]:
            tensors[name].view(torch.int16)[3, 5] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IdentityError):
        quantize(config)
