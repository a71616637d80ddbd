"""What is promised of equal bytes, as far as a CPU can show it. Kills, lost streams, clocks and places: tests/faults."""

from dataclasses import replace

import pytest
import torch

from cbqstream import quantize
from cbqstream.activations import read_ahead
from cbqstream.config import TransformConfig, WindowConfig
from cbqstream.errors import StoppedError, UsageError
from cbqstream.records import MemoryMode
from cbqstream.run import inputs
from cbqstream.runtime.device import make_deterministic
from cbqstream.runtime.offload import OffloadedTensor
from cbqstream.scheme import Scheme
from cbqstream.windows import resident
from tiny import files_of


def test_one_function_sets_everything():
    torch.use_deterministic_algorithms(mode=False)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = False
    torch.set_float32_matmul_precision("medium")
    assert make_deterministic(1) == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == 1
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    assert not cuda.matmul.allow_tf32
    assert not cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not cuda.cudnn_sdp_enabled()
    assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == (False, True, False)


@pytest.mark.parametrize("variable", ["NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"])
def test_the_environment_cannot_undo_it(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UsageError, match=f"{variable} is set"):
        make_deterministic(1)


SETTINGS = {"scheme": Scheme(num_bits=2, group_size=16, symmetric=False, activation_bits=8)}


def test_twice_the_same_whatever_the_global_generators_say(make_config):
    """And they are left as they were."""
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        outs.append(files_of(quantize(make_config(name=f"out-{seed}", **SETTINGS))))
        assert torch.equal(torch.get_rng_state(), before)
    assert outs[0] == outs[1]


def test_reading_further_ahead_changes_nothing(make_config, monkeypatch):
    outs = []
    for depth in (0, 1, 4):
        monkeypatch.setattr(read_ahead, "READ_DEPTH", depth)
        outs.append(files_of(quantize(make_config(name=f"out-{depth}", **SETTINGS))))
    assert outs[0] == outs[1] == outs[2]


@pytest.mark.parametrize("mode", ["signround", "lora_rounding"])
def test_activations_that_are_computed_again_change_nothing(make_config, monkeypatch, mode):
    real_plan, real_checkpoint, outs, calls = inputs.fitting_plan, resident.checkpoint, [], []

    def checkpoint(*arguments, **options):
        calls.append(1)
        return real_checkpoint(*arguments, **options)

    monkeypatch.setattr(resident, "checkpoint", checkpoint)
    for activation_checkpointing in (False, True):
        monkeypatch.setattr(
            inputs,
            "fitting_plan",
            lambda *given, on=activation_checkpointing: replace(
                real_plan(*given), memory_mode=MemoryMode(activation_checkpointing=on)
            ),
        )
        config = make_config(name=f"out-{activation_checkpointing}", reconstruction={"rounding": mode}, **SETTINGS)
        outs.append(files_of(quantize(config)))
        assert bool(calls) == activation_checkpointing
    assert outs[0] == outs[1]


OFFLOADED = {
    "W2 asymmetric": {"scheme": Scheme(num_bits=2, group_size=16, symmetric=False)},
    "low rank": {"reconstruction": {"rounding": "lora_rounding"}},
    "truncated weights": {"outliers": TransformConfig(weights=True)},
    "rescaled channels": {"scheme": Scheme(num_bits=4, group_size=32, activation_bits=8)},
    "static inputs": {"scheme": Scheme(num_bits=4, group_size=32, activation_bits=8, activation_strategy="tensor")},
    "experts, some of them undersampled": {"family": "qwen2_moe", "scheme": Scheme(num_bits=4, group_size=32)},
    "windows of three": {"window": WindowConfig(size=3, overlap=2)},
    "nothing is carried over": {"window": WindowConfig(size=3, overlap=0)},
}


@pytest.mark.parametrize("options", OFFLOADED.values(), ids=OFFLOADED)
def test_layers_that_lie_on_disk_change_nothing(make_config, monkeypatch, options):
    """Nor does being stopped; at most one layer is in memory, and nothing but the result is left of the file."""
    real_plan, placed = inputs.fitting_plan, []
    settings = {**SETTINGS, **options}
    family = settings.pop("family", "llama")
    plain = files_of(quantize(make_config(family, name="plain", **settings)))
    monkeypatch.setattr(
        inputs,
        "fitting_plan",
        lambda *given: replace(real_plan(*given), memory_mode=MemoryMode(activation_checkpointing=True, offload=True)),
    )
    real_read = OffloadedTensor.read

    def read(page):
        placed.append(page.nbytes)
        return real_read(page)

    monkeypatch.setattr(OffloadedTensor, "read", read)
    config = make_config(family, name="memory_mode", **settings)
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=1)
    assert files_of(quantize(config)) == plain
    assert placed


def test_another_seed_is_another_result(make_config):
    one, two = (files_of(quantize(make_config(name=f"out-{seed}", seed=seed, **SETTINGS))) for seed in (1, 2))
    assert one.keys() == two.keys()
    assert one != two


def test_uninitialised_memory_is_never_read(make_config, monkeypatch):
    """With it filled with NaN or left as it is: the same bytes."""
    outs = []
    for fill in (True, False):

        def settings(threads, fill=fill):
            count = make_deterministic(threads)
            torch.utils.deterministic.fill_uninitialized_memory = fill
            return count

        monkeypatch.setattr(inputs, "make_deterministic", settings)
        outs.append(files_of(quantize(make_config(name=f"out-{fill}", **SETTINGS))))
    assert outs[0] == outs[1]
