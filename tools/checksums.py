"""Print the SHA-256 of the results of tiny runs, to check that a change of the code changes no result.

Usage: checksums.py [CASE ...]

Save the output before a change, and compare it with the output after the change. The runs cover every rounding method, activation
quantization, a mixture of experts with offloaded layers, the end-to-end stage, and the run of the fault-injection tests. They use one
thread, so the results depend only on the code, the versions of the libraries, and the CPU.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cbqstream import PROFILES, CalibrationConfig, QuantizeConfig, ReconstructionConfig, Scheme, quantize
from cbqstream.records import MemoryMode
from cbqstream.run import inputs
from tiny import SEQ_LEN, save_model, save_tokens

FOUR_BITS = Scheme(num_bits=4, group_size=32)
PAPER = PROFILES["paper"]
CASES: dict[str, dict[str, Any]] = {
    "signround": {},
    "signround-w2-asymmetric": {
        "scheme": Scheme(num_bits=2, group_size=16, symmetric=False),
        "keep_first": 1,
        "override": ("down_proj=W4",),
    },
    "lora-rounding": {"reconstruction": {"rounding": "lora_rounding"}},
    "nearest": {"reconstruction": {"rounding": "nearest"}, "quantize_lm_head": True},
    "paper-w4a4": {
        "scheme": Scheme(num_bits=4, group_size=32, activation_bits=4),
        "profile": "paper",
    },
    "int-quantized-w8a8": {
        "scheme": Scheme(num_bits=8, group_size=None, activation_bits=8, symmetric=False),
        "override": ("down_proj=W4",),
        "reconstruction": {"rounding": "nearest"},
    },
    "input-steps-w4a8": {
        "family": "qwen3",
        "scheme": Scheme(num_bits=4, group_size=None, activation_bits=8, activation_strategy="tensor"),
    },
    "experts-offloaded-w4a8": {
        "family": "qwen3_moe",
        "scheme": Scheme(num_bits=4, group_size=32, activation_bits=8),
        "offload": True,
    },
    "end-to-end": {"family": "mixtral", "reconstruction": {"end_to_end_epochs": 2}},
}


def config_of(folder: Path, name: str, case: dict[str, Any], models: dict[str, Path]) -> QuantizeConfig:
    """Settings of the run of a case.

    Args:
        folder: folder with the tokens, in which the result is written.
        name: name of the case.
        case: row of `CASES`.
        models: folders of the models, by family.
    """
    profile = PROFILES[case.get("profile", "default")]
    sizes = {"epochs": 2, "batch_size": 4, **case.get("reconstruction", {})}
    kept = {key: case[key] for key in ("keep_first", "override", "quantize_lm_head") if key in case}
    return QuantizeConfig(
        model=str(models[case.get("family", "llama")]),
        out=str(folder / name),
        scheme=case.get("scheme", FOUR_BITS),
        calibration=CalibrationConfig(dataset=str(folder / "tokens.npy"), num_samples=16, seq_len=SEQ_LEN),
        window=profile.window,
        transforms=profile.transforms,
        reconstruction=replace(profile.reconstruction, **sizes),
        threads=1,
        device="cpu",
        **kept,
    )


def fault_injection_run(folder: Path, models: dict[str, Path]) -> QuantizeConfig:
    """Settings of the run that the fault-injection tests interrupt at every operation."""
    save_tokens(folder / "few-tokens.npy", 4 * SEQ_LEN)
    data = CalibrationConfig(dataset=str(folder / "few-tokens.npy"), num_samples=4, seq_len=SEQ_LEN)
    learned = ReconstructionConfig(epochs=4, batch_size=4)
    where = {"model": str(models["llama"]), "out": str(folder / "fault-injection"), "threads": 1, "device": "cpu"}
    return QuantizeConfig(scheme=FOUR_BITS, calibration=data, reconstruction=learned, **where)


def lines(name: str, out: Path) -> Iterator[str]:
    """Lines with a checksum of each shard of a result, and one of the losses of its windows and epochs."""
    for shard in sorted(out.glob("*.safetensors")):
        yield f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {name}/{shard.name}"
    reports = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(report["loss_before"], report["loss_after"], report.get("changed")) for report in reports]
    yield f"{hashlib.sha256(repr(losses).encode()).hexdigest()}  {name}/losses"


def main() -> None:
    """Run the given cases, or all of them, in a temporary folder."""
    names = sys.argv[1:] or [*CASES, "fault-injection"]
    plan = inputs.fitting_plan
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        models = {
            name: save_model(folder / f"model-{name}", name) for name in ("llama", "qwen3", "qwen3_moe", "mixtral")
        }
        save_tokens(folder / "tokens.npy", 16 * SEQ_LEN)
        for name in names:
            if name == "fault-injection":
                print(*lines(name, quantize(fault_injection_run(folder, models))), sep="\n")
                continue
            case = CASES[name]
            if case.get("offload"):
                modes = MemoryMode(activation_checkpointing=True, offload=True)
                inputs.fitting_plan = lambda *given, modes=modes: replace(plan(*given), memory_mode=modes)
            out = quantize(config_of(folder, name, case, models))
            inputs.fitting_plan = plan
            print(*lines(name, out), sep="\n")


if __name__ == "__main__":
    main()
