"""Whole runs on a pretend CUDA device (`tests/pretend_cuda.py`), which refuses what a CUDA device refuses.

The table of what runs, how often a training step waits for the device, and how attention is computed:

    TRITON_INTERPRET=1 PYTHONPATH=tests pytest -p no:xdist -s -k pretend tests/integration/test_pretend_cuda.py
"""

from dataclasses import fields, replace

import pytest

from cbqstream import quantize
from cbqstream.config import TransformConfig, WindowConfig
from cbqstream.evaluation.perplexity import evaluate
from cbqstream.profiles import PROFILES
from cbqstream.records import MemoryMode
from cbqstream.run import inputs
from cbqstream.scheme import Scheme
from cbqstream.windows import reconstruct
from pretend_cuda import running
from tiny import SEQ_LEN

ONE = WindowConfig(size=1, overlap=0)
A8 = {"num_bits": 4, "group_size": 32, "activation_bits": 8}
PLAIN_SCHEMES = {
    "W2A16 asymmetric, group 16": Scheme(num_bits=2, group_size=16, symmetric=False),
    "W8A8 per channel": Scheme(num_bits=8, group_size=None, activation_bits=8),
    "W4A8": Scheme(**A8),
    "W4A8, learned input scales": Scheme(**A8, activation_strategy="tensor"),
    "W4A4": Scheme(num_bits=4, group_size=32, activation_bits=4),
}
MODES = {
    "activation checkpointing": MemoryMode(activation_checkpointing=True),
    "layers on disk": MemoryMode(activation_checkpointing=True, offload=True),
    "streams on disk": MemoryMode(streams_on_disk=True),
}
CASES = {
    **{f"profile {name}": {"profile": name} for name in PROFILES},
    **{name: {"scheme": scheme} for name, scheme in PLAIN_SCHEMES.items()},
    **{name: {"mode": mode} for name, mode in MODES.items()},
    "nearest, min-max grid": {"reconstruction": {"rounding": "nearest", "init": "minmax"}},
    "plain kernels": {"reconstruction": {"kernels": "plain"}},
    "smoothing with the rule huawei": {
        "scheme": Scheme(**A8),
        "transforms": TransformConfig(smoothing="always", smoothing_rule="huawei"),
    },
    "KL divergence": {"reconstruction": {"kl_weight": 1.0}},
    "gptq, W4A8, a mixture": {
        "family": "qwen2_moe",
        "scheme": Scheme(**A8),
        "window": ONE,
        "reconstruction": {"rounding": "gptq"},
    },
    "experts alone": {"family": "qwen3_moe", "window": ONE, "reconstruction": {"experts": "alone"}},
    "experts alone, inputs on disk": {
        "family": "qwen3_moe",
        "window": ONE,
        "reconstruction": {"experts": "alone"},
        "mode": MemoryMode(expert_inputs_on_disk=True),
    },
    "all experts": {"family": "mixtral", "all_experts": True},
    **{
        f"family {name}": {"family": name}
        for name in ("mistral", "qwen3", "opt", "bloom", "gemma2", "phi3", "deepseek_v3", "glm4", "falcon")
    },
}
WAITS = {"layers on disk": 200, "all experts": 2, "family deepseek_v3": 2, "family falcon": 8}
"""Largest number of times that a training step waits for the device, where it waits: for layers that are read, once in a block for the
tokens of experts, and for lists of indices in transformers."""
EAGER = {"bloom", "gemma2"}
"""Families without fused attention."""


@pytest.fixture
def pretend(monkeypatch):
    """The pretend device, which runs during the test, and a list of training steps with the times that each window waited."""
    windows = []
    with running(monkeypatch) as device:
        train = reconstruct._train

        def counted(blocks, roundings, input_steps, data, order):
            before = device.waits.copy()
            train(blocks, roundings, input_steps, data, order)
            with_head = getattr(data, "predictions", None) is not None
            windows.append((with_head, len(order), device.waits - before))

        monkeypatch.setattr(reconstruct, "_train", counted)
        yield device, windows


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_the_pretend_device(case, make_config, tokens, pretend, monkeypatch):
    """The run ends, no step outside the window with the head waits for the device, and the result predicts as well as on the CPU."""
    options = dict(CASES[case])
    family, mode = options.pop("family", "llama"), options.pop("mode", None)
    profile = PROFILES[options.pop("profile", "default")]
    settings = {field.name: getattr(profile.reconstruction, field.name) for field in fields(profile.reconstruction)}
    few = {"epochs": 1, "batch_size": min(2, settings["batch_size"])}
    if not case.startswith("profile"):  # the first window, without the grid search, which is most of the time
        few |= {"init": "minmax"}
        options = {"keep_last": 2, **options}
    options["reconstruction"] = {**settings, **few, **options.pop("reconstruction", {})}
    options = {"window": profile.window, "transforms": profile.transforms, **options}
    if mode is not None:
        plan = inputs.fitting_plan
        monkeypatch.setattr(inputs, "fitting_plan", lambda *given: replace(plan(*given), memory_mode=mode))
    device, windows = pretend
    out = quantize(make_config(family, device="cuda", num_samples=8, **options))
    found = evaluate(out, tokens, num_samples=4, seq_len=SEQ_LEN, batch_size=4, device="cuda", threads=1)
    assert device.operations > 1000
    waits = [(count.total() / steps, count) for with_head, steps, count in windows if not with_head and steps]
    assert not [place for _, place in device.waits if place.startswith("activations/write_behind")]
    print(f"\n| {case} | {max((each for each, _ in waits), default=0):.1f} | {dict(device.attention)} |")
    assert not [count for each, count in waits if each > WAITS.get(case, 0)]
    assert bool(device.attention) == (family not in EAGER)
    monkeypatch.undo()
    expected = evaluate(out, tokens, num_samples=4, seq_len=SEQ_LEN, batch_size=4, device="cpu", threads=1)
    # the router of DeepSeek chooses other experts in bf16
    assert found.perplexity == pytest.approx(expected.perplexity, rel=0.06 if family == "deepseek_v3" else 0.02)
