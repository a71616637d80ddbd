"""End-to-end stage after the last window: gradients, trained scales, epochs that are reverted, and runs that are killed and resumed."""

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
from tiny import SEQ_LEN, SOME_FAMILIES, VOCAB, save_model

CPU = torch.device("cpu")
COMPUTE = Compute(CPU, torch.float32, 4)
GEMMA_4 = {
    "like": "gemma2",
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "global_head_dim": 16,
}
"""Settings with which the last blocks read keys and values of earlier ones."""
SCHEME = Scheme(num_bits=2, group_size=16, symmetric=False)


def learn(config, **options):
    """Quantize, and return the folder of the result and the reports of the epochs."""
    reports = []
    out = quantize(config, lambda event: reports.append(event) if isinstance(event, EpochReport) else None, **options)
    return out, reports


def shards(folder: Path) -> dict[str, bytes]:
    """Content of the shards of all blocks, by file name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("block-*"))}


def divergence_of(out, model, tokens) -> float:
    """KL divergence of the predictions of a result from those of the original model on the first seven segments.

    transformers computes both predictions with the whole model.
    """
    ids = load_segments(tokens, model, num_samples=7, seq_len=SEQ_LEN, vocab_size=VOCAB)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = whole(ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    meta_model, source = open_model(out)
    for spec in meta_model.blocks:
        for name, stored in spec.tensors.items():
            whole.get_parameter(f"{spec.prefix}.{name}").data = source.read(stored, device=CPU, dtype=torch.float32)
    found = whole(ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    return nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("family", [*SOME_FAMILIES, "gemma4_text"])
def test_streamed_gradients_are_those_of_the_whole_model(tiny_models, tmp_path, tokens, family):
    """Gradients agree with those of autograd through the forward pass of transformers.

    At theta = 0, dL/dtheta of a group of weights is the sum of w dL/dw. Block 0 is in full precision.
    """
    folder = (
        tiny_models[family]
        if family in SOME_FAMILIES
        else save_model(tmp_path / "model", family, dtype=torch.float32, **GEMMA_4)
    )
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
        arguments = outer.block_arguments(ids_S)
        model = StreamedModel(blocks.__getitem__, arguments, steps, outer.head, COMPUTE)
        x_SD, values = outer.enter(ids_S, arguments)
        states = model.forward(x_SD.unsqueeze(0), {key: value.unsqueeze(0) for key, value in values.items()})
        last = states[-1][0].requires_grad_()
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
def test_epochs_reduce_the_divergence_and_change_only_scales(make_config, tokens, options):
    """The divergence is measured on the training segments, because fewer than eight segments have no held-out segments.

    On other segments it would not decrease: the text is random, so there is nothing general to learn.
    """
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


def test_an_epoch_that_increases_the_held_out_loss_is_reverted(make_config):
    """With a learning rate of 3, the shards are those of a run without the end-to-end stage."""
    plain, _ = learn(make_config(name="plain", scheme=SCHEME))
    reverted, reports = learn(
        make_config(name="reverted", scheme=SCHEME, reconstruction={"end_to_end_epochs": 1, "end_to_end_lr": 3.0})
    )
    assert reports[0].loss_after == reports[0].loss_before
    assert shards(plain) == shards(reverted)


@pytest.mark.parametrize("family", ["bloom", "deepseek_v3", "gemma3", "mixtral", "qwen2_5_vl", "qwen3_moe"])
def test_scales_are_trained_in_families_whose_layers_have_other_names_in_the_checkpoint(make_config, family):
    """Scales are trained by the name of the module and stored by the name in the checkpoint.

    Scales of undersampled experts do not change.
    """
    settings = {"epochs": 0, "end_to_end_lr": 1e-2}
    before, _ = learn(make_config(family, name="before", scheme=SCHEME, reconstruction=settings, num_samples=4))
    config = make_config(family, scheme=SCHEME, reconstruction={"end_to_end_epochs": 1, **settings}, num_samples=4)
    windows = []
    after = quantize(config, lambda event: windows.append(event) if isinstance(event, WindowReport) else None)
    undersampled = {path for report in windows for path in report.undersampled}
    meta_model, source = open_model(after)
    original = open_model(before)[1]
    changed = {
        f"{spec.prefix}.{name}": not torch.equal(*(of.packed(spec.stored(name)).scale for of in (original, source)))
        for spec in meta_model.blocks
        for name in spec.linears
    }
    assert any(changed.values())
    assert not any(changed[path] for path in undersampled)
    assert undersampled or family != "qwen3_moe"


def test_a_run_that_is_killed_in_the_end_to_end_stage_produces_identical_shards(make_config):
    """One run is killed before each fifth durable operation of this stage, and resumed. At most one epoch is repeated."""
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
