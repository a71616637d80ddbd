"""Determinism on the CPU: runs with equal settings and inputs produce identical bytes.

tests/faults tests the same after kills, lost streams, changed clocks and moved folders.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from cbqstream import quantize
from cbqstream.activations import read_ahead
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.config import TransformConfig, WindowConfig
from cbqstream.errors import StoppedError, UsageError
from cbqstream.records import MemoryMode
from cbqstream.run import inputs, pipeline
from cbqstream.runtime.device import fixed_numerics
from cbqstream.runtime.offload import OffloadedTensor
from cbqstream.scheme import Scheme
from cbqstream.windows import resident_block
from tiny import files_of

CPU = torch.device("cpu")


def test_fixed_numerics_sets_all_global_state_of_torch_on_which_results_depend():
    with fixed_numerics(CPU, 2):  # restores the state of torch that this test changes
        torch.use_deterministic_algorithms(mode=False)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = False
        torch.set_float32_matmul_precision("medium")
        with fixed_numerics(CPU, 1) as threads:
            assert threads == 1
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
def test_fixed_numerics_refuses_environment_variables_that_enable_tf32(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UsageError, match=f"{variable} is set"), fixed_numerics(CPU, 1):
        pass


SETTINGS = {"scheme": Scheme(num_bits=2, group_size=16, symmetric=False, activation_bits=8)}


def test_results_do_not_depend_on_the_global_random_generator(make_config):
    """A run does not change the state of the global random generator of torch either."""
    outs = []
    for seed in (1, 2):
        config = make_config(name=f"out-{seed}", **SETTINGS)  # may make the model, which changes the state
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        outs.append(files_of(quantize(config)))
        assert torch.equal(torch.get_rng_state(), before)
    assert outs[0] == outs[1]


def test_results_do_not_depend_on_the_depth_of_reading_ahead(make_config, monkeypatch):
    outs = []
    for depth in (0, 1, 4):
        monkeypatch.setattr(read_ahead, "READ_DEPTH", depth)
        outs.append(files_of(quantize(make_config(name=f"out-{depth}", **SETTINGS))))
    assert outs[0] == outs[1] == outs[2]


@pytest.mark.parametrize("mode", ["signround", "lora_rounding"])
def test_results_do_not_depend_on_activation_checkpointing(make_config, monkeypatch, mode):
    real_plan, real_checkpoint, outs, calls = inputs.fitting_plan, resident_block.checkpoint, [], []

    def checkpoint(*arguments, **options):
        calls.append(1)
        return real_checkpoint(*arguments, **options)

    monkeypatch.setattr(resident_block, "checkpoint", checkpoint)
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


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_results_do_not_depend_on_streams_in_memory(make_config, monkeypatch, family):
    """A run with streams on disk alone, which is stopped and resumed, gives the bytes of a run that keeps them in memory.

    In memory, no chunk is read after the first window, which reads the two streams at its input.
    """
    real_plan, real_read, outs, reads = inputs.fitting_plan, ZarrStore._read_chunk, [], []

    def read(store, segment):
        reads.append(store.path.name)
        return real_read(store, segment)

    monkeypatch.setattr(ZarrStore, "_read_chunk", read)
    for streams_on_disk in (False, True):
        monkeypatch.setattr(
            inputs,
            "fitting_plan",
            lambda *given, on=streams_on_disk: replace(real_plan(*given), memory_mode=MemoryMode(streams_on_disk=on)),
        )
        reads.clear()
        config = make_config(family, name=f"out-{streams_on_disk}", **SETTINGS)
        if streams_on_disk:
            with pytest.raises(StoppedError):
                quantize(config, stop_after_window=1)
        outs.append(files_of(quantize(config)))
        counts = {name: reads.count(name) for name in ("reference", "quantized", "targets")}
        segments = config.calibration.num_samples
        if streams_on_disk:
            assert min(counts.values()) > 3 * segments
        else:
            assert counts == {"reference": segments, "quantized": segments, "targets": 0}
    assert outs[0] == outs[1]


OFFLOADED = {
    "W2 asymmetric": {"scheme": Scheme(num_bits=2, group_size=16, symmetric=False)},
    "lora_rounding": {"reconstruction": {"rounding": "lora_rounding"}},
    "truncated weights": {"transforms": TransformConfig(truncate_weights=True)},
    "smoothed channels": {"scheme": Scheme(num_bits=4, group_size=32, activation_bits=8)},
    "learned input scales": {
        "scheme": Scheme(num_bits=4, group_size=32, activation_bits=8, activation_strategy="tensor")
    },
    "experts, some of which are undersampled": {"family": "qwen2_moe", "scheme": Scheme(num_bits=4, group_size=32)},
    "gptq": {"window": WindowConfig(size=1, overlap=0), "reconstruction": {"rounding": "gptq"}},
    "gptq with experts and quantized inputs": {
        "family": "qwen2_moe",
        "window": WindowConfig(size=1, overlap=0),
        "reconstruction": {"rounding": "gptq"},
        "scheme": Scheme(num_bits=4, group_size=32, activation_bits=8),
    },
    "windows of three": {"window": WindowConfig(size=3, overlap=2)},
    "windows without overlap": {"window": WindowConfig(size=3, overlap=0)},
}


@pytest.mark.parametrize("options", OFFLOADED.values(), ids=OFFLOADED)
def test_results_do_not_depend_on_offloading(make_config, monkeypatch, options):
    """A run with offloaded layers, which is stopped after the first window and resumed, produces the bytes of a run without them."""
    real_plan, reads = inputs.fitting_plan, []
    settings = {**SETTINGS, **options}
    family = settings.pop("family", "llama")
    plain = files_of(quantize(make_config(family, name="plain", **settings)))
    monkeypatch.setattr(
        inputs,
        "fitting_plan",
        lambda *given: replace(real_plan(*given), memory_mode=MemoryMode(activation_checkpointing=True, offload=True)),
    )
    real_read = OffloadedTensor.read

    def read(tensor):
        reads.append(tensor.nbytes)
        return real_read(tensor)

    monkeypatch.setattr(OffloadedTensor, "read", read)
    config = make_config(family, name="offloaded", **settings)
    with pytest.raises(StoppedError):
        quantize(config, stop_after_window=1)
    assert files_of(quantize(config)) == plain
    assert reads


def test_another_seed_gives_another_result(make_config):
    one, two = (files_of(quantize(make_config(name=f"out-{seed}", seed=seed, **SETTINGS))) for seed in (1, 2))
    assert one.keys() == two.keys()
    assert one != two


def test_uninitialized_memory_is_never_read(make_config, monkeypatch):
    """Results are identical if torch fills new tensors with NaN and if it leaves them uninitialized."""
    outs = []
    for fill in (True, False):

        @contextmanager
        def fixed_and_filled(device, threads, fill=fill):
            with fixed_numerics(device, threads) as count:
                torch.utils.deterministic.fill_uninitialized_memory = fill
                yield count

        monkeypatch.setattr(pipeline, "fixed_numerics", fixed_and_filled)
        outs.append(files_of(quantize(make_config(name=f"out-{fill}", **SETTINGS))))
    assert outs[0] == outs[1]
