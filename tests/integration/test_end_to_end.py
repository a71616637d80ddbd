"""The stage after the windows: gradients are those of the whole model, codes stay, and an epoch that is stopped is done again."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cbqstream import quantize
from cbqstream.calibration.segments import load_segments
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import Disk
from cbqstream.evaluation.model import open_model
from cbqstream.models.block import build_block
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.numerics.losses import head_divergence
from cbqstream.records import Compute, EpochReport, WindowReport
from cbqstream.scheme import Scheme
from cbqstream.windows.step_sizes import StepSizes, StreamedModel
from killing import quantize_until, windows_committed
from tiny import SEQ_LEN, SOME_FAMILIES, VOCAB

CPU = torch.device("cpu")
COMPUTE = Compute(CPU, torch.float32, 4)
SCHEME = Scheme(num_bits=2, group_size=16, symmetric=False)


def learn(config, **options):
    """Quantize, and the reports of the epochs."""
    reports = []
    out = quantize(config, lambda event: reports.append(event) if isinstance(event, EpochReport) else None, **options)
    return out, reports


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("block-*"))}


def divergence_of(out, model, tokens) -> float:
    """Of the predictions on the first seven segments, by whole models."""
    ids = load_segments(tokens, model, num_samples=7, seq_len=SEQ_LEN, vocab_size=VOCAB)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = whole(ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    meta_model, source = open_model(out)
    for spec in meta_model.blocks:
        for name, stored in spec.tensors.items():
            whole.get_parameter(f"{spec.prefix}.{name}").data = source.read(stored, device=CPU, dtype=torch.float32)
    found = whole(ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    return nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_streamed_gradients_are_those_of_the_whole_model(tiny_models, tokens, family):
    """Against autograd through transformers' own forward pass: at theta = 0, dL/dtheta of a group is the sum of w dL/dw."""
    folder = tiny_models[family]
    meta_model, source = open_model(folder)
    ids_S = load_segments(tokens, folder, num_samples=1, seq_len=SEQ_LEN, vocab_size=VOCAB)[0]
    with load_embedding_and_head(meta_model, source, device=CPU, dtype=torch.float32) as outer:
        blocks = [
            build_block(meta_model, index, source, device=CPU, dtype=torch.float32, linear_dtype=torch.float32)
            for index in range(len(meta_model.blocks))
        ]
        steps = []
        for index, spec in enumerate(meta_model.blocks):
            weights = {name: blocks[index].get_parameter(f"{name}.weight") for name in spec.linears if index > 0}
            steps.append(
                {name: StepSizes.at(torch.ones(len(w_OI), w_OI.shape[1] // 8)) for name, w_OI in weights.items()}
            )
        model = StreamedModel(blocks.__getitem__, outer.block_arguments(ids_S), steps, outer.head, COMPUTE)
        states = model.forward(outer.embed(ids_S).unsqueeze(0))
        last = states[-1].requires_grad_()
        goal = torch.randn(last.shape[1:], generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(head_divergence(last[0], goal, outer.head), last)
        model.backward(states, gradient)
        expected = outer.head(goal).log_softmax(-1)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = whole(ids_S.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
    nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").backward()
    parameters = dict(whole.named_parameters())
    for spec, of_block in zip(meta_model.blocks[1:], steps[1:], strict=True):
        for name, of_layer in of_block.items():
            weight = parameters[f"{spec.prefix}.{name}.weight"]
            by_hand = (weight * weight.grad).view(*of_layer.theta.shape, 8).sum(-1)
            assert of_layer.theta.grad is not None
            assert torch.allclose(of_layer.theta.grad, by_hand, rtol=1e-3, atol=1e-6)
    assert len(steps[1]) >= 6


@pytest.mark.parametrize("options", [{}, {"keep_first": 1, "keep_last": 1}], ids=["all blocks", "some blocks"])
def test_it_comes_nearer_to_the_predictions_and_changes_nothing_but_step_sizes(make_config, tokens, options):
    """The held_out is what is trained on, because there are fewer than eight segments: random text has nothing to learn in general."""
    settings, options = {"end_to_end_lr": 1e-2}, {**options, "num_samples": 7}
    before, _ = learn(make_config(name="before", scheme=SCHEME, **options))
    config = make_config(name="after", scheme=SCHEME, reconstruction={"end_to_end_epochs": 2, **settings}, **options)
    after, reports = learn(config)
    assert [report.epoch for report in reports] == [0, 1]
    assert reports[1].loss_after < reports[0].loss_after < reports[0].loss_before
    assert reports[1].loss_before == pytest.approx(reports[0].loss_after)
    assert reports[0].loss_before == pytest.approx(divergence_of(before, config.model, tokens), rel=2e-2)
    old, new = Checkpoint.open(before), Checkpoint.open(after)
    assert old.infos.keys() == new.infos.keys()
    changed = {
        name.rpartition(".")[2]
        for name in old.infos
        if not torch.equal(old.read(name, device=CPU), new.read(name, device=CPU))
    }
    assert changed == {"weight_scale"}
    assert not list((config.run_path / "acts").iterdir())


def test_an_epoch_that_makes_it_worse_is_taken_back(make_config):
    plain, _ = learn(make_config(name="plain", scheme=SCHEME))
    worse, reports = learn(
        make_config(
            name="held-out loss increased", scheme=SCHEME, reconstruction={"end_to_end_epochs": 1, "end_to_end_lr": 3.0}
        )
    )
    assert reports[0].loss_after == reports[0].loss_before
    assert shards(plain) == shards(worse)


@pytest.mark.parametrize("family", ["bloom", "deepseek_v3", "gemma3", "mixtral", "qwen2_5_vl", "qwen3_moe"])
def test_layers_that_the_checkpoint_calls_otherwise(make_config, family):
    """Step sizes are learned by module and stored by name; those of experts that saw too few tokens stay as they are."""
    settings = {"epochs": 0, "end_to_end_lr": 1e-2}
    before, _ = learn(make_config(family, name="before", scheme=SCHEME, reconstruction=settings, num_samples=4))
    config = make_config(family, scheme=SCHEME, reconstruction={"end_to_end_epochs": 1, **settings}, num_samples=4)
    windows = []
    after = quantize(config, lambda event: windows.append(event) if isinstance(event, WindowReport) else None)
    undersampled = {path for report in windows for path in report.undersampled}
    meta_model, source = open_model(after)
    original = open_model(before)[1]
    moved = {
        f"{spec.prefix}.{name}": not torch.equal(*(of.packed(spec.stored(name)).scale for of in (original, source)))
        for spec in meta_model.blocks
        for name in spec.linears
    }
    assert any(moved.values())
    assert not any(moved[path] for path in undersampled)
    assert undersampled or family != "qwen3_moe"


def test_stopped_in_any_epoch(make_config):
    """Killed before each durable operation of this stage: the same bytes, and at most one epoch again."""
    settings = {"reconstruction": {"epochs": 1, "end_to_end_epochs": 2, "end_to_end_lr": 1e-2}, "scheme": SCHEME}
    operations = []
    whole, _ = learn(make_config(name="whole", **settings), disk=Disk(lambda *what: operations.append(what)))
    commits = [number for number, name, path in operations if name == "rename" and path.parent.name == "commits"]
    assert len(commits) == 5
    for stop in range(commits[2], len(operations) + 1, 5):
        config = make_config(name=f"stop-{stop}", **settings)
        quantize_until(config, lambda number, name, path, stop=stop: number == stop)
        committed = windows_committed(config.run_path)
        out, reports = learn(config)
        assert [report.epoch for report in reports] == list(range(max(0, committed - 3), 2)), stop
        assert shards(out) == shards(whole), stop
        assert not list((config.run_path / "acts").iterdir())
