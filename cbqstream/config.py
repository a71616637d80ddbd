"""Settings of a run: frozen dataclasses that are checked when they are made and never change afterwards. This module does not import torch.

Every field is made with `setting`, which holds its description. The flags of the command line and their help are generated from the fields
(`options.py`), so a setting is described once.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cbqstream.errors import UsageError
from cbqstream.scheme import LayerSchemes, Scheme, path_pattern
from cbqstream.setting import require, require_at_least, require_choice, require_device, setting, suggestion

RoundingName = Literal["signround", "lora_rounding", "gptq", "nearest"]
ScaleInit = Literal["minmax", "search"]
Schedule = Literal["linear", "cosine"]
SmoothWhen = Literal["never", "quantized", "always"]
SmoothingRule = Literal["paper", "huawei", "search"]
Kernels = Literal["auto", "plain"]
ExpertsName = Literal["window", "alone"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """The text from which the quantizer learns."""

    dataset: str = setting(
        help="Calibration data: text, JSON lines, JSON, CSV or parquet, or token ids in .npy or .safetensors",
        panel="Calibration",
    )
    num_samples: int = setting(128, help="Number of calibration segments", panel="Calibration")
    seq_len: int = setting(2048, help="Tokens in a segment", panel="Calibration")
    all_experts: bool = setting(
        False,
        help="Gather statistics with every token sent to every expert, not only to those that the router chooses",
        panel="Calibration",
        flag="calibrate_all_experts",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_samples")
        require_at_least(self, 2, "seq_len")


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """Division of the transformer blocks into windows."""

    size: int = setting(2, help="Blocks that are optimized together", flag="window_size")
    overlap: int = setting(1, help="Blocks that a window shares with the next one")

    def __post_init__(self) -> None:
        require(self.size >= 1, f"window size is {self.size}. It must be at least 1.")
        require(
            0 <= self.overlap < self.size,
            f"window overlap is {self.overlap}. It must be 0 to {self.size - 1} for a window of {self.size} blocks.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig:
    """Changes of a block that make it easier to quantize. Formulas of outliers: `numerics/outliers.py`."""

    truncate_weights: bool = setting(False, help="Truncate the outliers of every weight")
    smoothing: SmoothWhen = setting(
        "quantized", help="When channels are rescaled: never, quantized (with A8 and A4) or always"
    )
    smoothing_rule: SmoothingRule = setting(
        "search",
        help="Scales of the channels: paper (outliers by CFP), huawei (its public variant) or search (least output error)",
    )
    outlier_lambda1: float = setting(1.5, help="Interquartile ranges above the upper quartile where outliers may begin")
    outlier_lambda2: float = setting(
        1.0, help="Weight of the variance of the reserved values beside the gap to outliers"
    )

    def __post_init__(self) -> None:
        require_choice(self, "smoothing", SmoothWhen)
        require_choice(self, "smoothing_rule", SmoothingRule)
        for name in ("outlier_lambda1", "outlier_lambda2"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}. It must not be negative.")

    def smooths(self, scheme: Scheme) -> bool:
        """Whether channels are rescaled under a scheme."""
        return self.smoothing == "always" or (self.smoothing == "quantized" and scheme.activation_bits is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig:
    """Settings with which a window is optimized. Formulas: `numerics/`; rounding methods: `rounding/`."""

    rounding: RoundingName = setting(
        "signround",
        help="Rounding method: signround (one value per weight), lora_rounding (low-rank AdaRound), gptq (closed form, no training)"
        " or nearest",
    )
    init: ScaleInit = setting(
        "search", help="Starting scales: minmax, or search for the least error weighted by the inputs' second moment"
    )
    schedule: Schedule = setting("linear", help="How learning rates fall to zero: linear or cosine")
    epochs: int = setting(6, help="Passes over the calibration segments per window")
    batch_size: int = setting(4, help="Segments in a training step")
    max_shift: float = setting(
        0.25, help="how far a rounding value can move in a window, in step sizes", method="signround"
    )
    rounding_lr: float = setting(1e-2, help="learning rate of the factors (Adam)", method="lora_rounding")
    rounding_rank: int = setting(5, help="rank of the factors", method="lora_rounding")
    scale_lr: float = setting(1e-3, help="Learning rate of the logarithm of the weight scales (Adam)")
    activation_scale_lr: float = setting(1e-4, help="Learning rate of the logarithm of learned input scales (Adam)")
    target_mix: float = setting(
        0.75,
        help="Share of the original model's output in the target, 0 to 1; the rest is its output on quantized inputs",
    )
    kl_weight: float = setting(0.0, help="Weight of the KL divergence over the hidden dimension")
    head_weight: float = setting(
        0.1, help="Weight of the divergence of the next-token distribution in the last window; 0 leaves it out"
    )
    head_stride: int = setting(
        4, help="Evaluate the next-token distribution on every Nth token, a different one each step"
    )
    end_to_end_epochs: int = setting(
        0, help="Passes after the last window in which the scales of all blocks are trained together"
    )
    end_to_end_lr: float = setting(2e-3, help="Learning rate of the logarithm of the scales in these passes (Adam)")
    penalty_weight: float = setting(
        0.1, help="weight of the penalty that drives rounding up or down", method="lora_rounding"
    )
    damping: float = setting(
        0.1, help="share of the mean input power that is added to the power of every input column", method="gptq"
    )
    kernels: Kernels = setting("auto", help="Triton kernels on CUDA (auto), or torch alone (plain)")
    token_balance: float = setting(
        1.0, help="0: squared error of every token as it is; 1: relative to the token's power"
    )
    channel_balance: float = setting(
        0.5, help="0: squared error of every channel as it is; 1: relative to the channel's power"
    )
    robust_tokens: int = setting(0, help="Tokens of a segment with the largest target norm that the loss leaves out")
    experts: ExpertsName = setting(
        "window",
        help="Experts of a mixture are trained with their window, or alone on the tokens that the router sends to them",
    )

    def __post_init__(self) -> None:
        for name, choices in (
            ("rounding", RoundingName),
            ("init", ScaleInit),
            ("schedule", Schedule),
            ("kernels", Kernels),
            ("experts", ExpertsName),
        ):
            require_choice(self, name, choices)
        require_at_least(self, 0, "epochs", "end_to_end_epochs", "robust_tokens")
        require_at_least(self, 1, "batch_size", "rounding_rank", "head_stride")
        for name in ("target_mix", "token_balance", "channel_balance"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}. It must be 0 to 1.")
        for name in (
            "max_shift",
            "rounding_lr",
            "scale_lr",
            "activation_scale_lr",
            "end_to_end_lr",
            "kl_weight",
            "head_weight",
            "penalty_weight",
            "damping",
        ):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}. It must not be negative.")


def parse_bytes(text: str) -> int:
    """Number of bytes of a size such as 16GiB, 1.5 GB or 800MiB.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size. Write it as 16GiB or 800MB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1))


_OVERRIDE = re.compile(r"(.+)=W([2-8])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    """All settings of a run."""

    model: str = setting(
        help="Folder with config.json and safetensors, or OWNER/NAME on the Hub", panel="Model and output"
    )
    out: str = setting(help="Folder to write; it must not exist, or be empty", panel="Model and output")
    scheme: Scheme = setting(help="Bits of weights and inputs: W2 to W8 with A16, A8 or A4, such as W4A8")
    calibration: CalibrationConfig = setting(help="See CalibrationConfig", flag="")
    run_dir: str | None = setting(None, help="Folder for the state of the run; OUT.run by default", panel="Run")
    window: WindowConfig = setting(help="See WindowConfig", flag="", from_factory=WindowConfig)
    transforms: TransformConfig = setting(help="See TransformConfig", flag="", from_factory=TransformConfig)
    reconstruction: ReconstructionConfig = setting(
        help="See ReconstructionConfig", flag="", from_factory=ReconstructionConfig
    )
    blocks_path: str | None = setting(
        None, help="Module path of the list of transformer blocks, if it is not found", panel="Model and output"
    )
    ignore: tuple[str, ...] = setting(
        (),
        help="Layers that stay in full precision: whole parts of module paths, such as down_proj or layers.3.mlp.*",
        panel="Model and output",
    )
    override: tuple[str, ...] = setting(
        (), help="Layers with weights of another width, such as down_proj=W8", panel="Model and output"
    )
    quantize_lm_head: bool = setting(
        False,
        help="Quantize the head too, rounded to nearest; its width: --override lm_head=W8",
        panel="Model and output",
    )
    keep_first: int = setting(0, help="Blocks at the start that stay in full precision", panel="Model and output")
    keep_last: int = setting(0, help="Blocks at the end that stay in full precision", panel="Model and output")
    seed: int = setting(0, help="Random seed", panel="Run")
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N", panel="Run")
    max_ram: int | None = setting(
        None, help="Memory that the run may take, such as 16GiB; a run that does not fit is refused", panel="Limits"
    )
    max_vram: int | None = setting(None, help="Device memory that the run may take, such as 12GiB", panel="Limits")
    threads: int | None = setting(
        None, help="CPU threads; the physical cores by default. The last bits of results depend on it", panel="Run"
    )

    def __post_init__(self) -> None:
        require_at_least(self, 0, "keep_first", "keep_last")
        require_device(self.device)
        for name in ("ignore", "override"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for text in self.override:
            require(_OVERRIDE.fullmatch(text) is not None, f"override {text!r} is not as PATTERN=W8.")
        for name in ("max_ram", "max_vram"):
            require((getattr(self, name) or 1) > 0, f"{name} is {getattr(self, name)}. It must be more than 0.")
        require(
            not self.quantize_lm_head or self.scheme.activation_bits is None,
            "--quantize-lm-head quantizes no inputs. Use a scheme with A16.",
        )
        require(
            self.reconstruction.rounding != "gptq" or self.window.size == 1,
            f"rounding gptq quantizes one block at a time, and the window size is {self.window.size}."
            " Use --profile quick, or --window-size 1 --overlap 0.",
        )
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}. It must be at least 1.")

    @property
    def schemes(self) -> LayerSchemes:
        """The schemes of the layers that are quantized."""
        matches = [match for text in self.override if (match := _OVERRIDE.fullmatch(text)) is not None]
        others = tuple((path_pattern(match[1]), replace(self.scheme, num_bits=int(match[2]))) for match in matches)
        return LayerSchemes(self.scheme, others)

    def is_ignored(self, path: str) -> bool:
        """Whether the layer with a module path stays in full precision."""
        return any(re.fullmatch(path_pattern(pattern), path) for pattern in self.ignore)

    @property
    def run_path(self) -> Path:
        """The run directory."""
        return Path(self.run_dir) if self.run_dir is not None else Path(self.out.rstrip("/") + ".run")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, nested like the classes."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizeConfig":
        """The inverse of `to_dict`.

        Raises:
            UsageError: a key is unknown or missing, or a value is out of range.
        """
        built = {key: _build(SECTIONS[key], value) if key in SECTIONS else value for key, value in values.items()}
        config: QuantizeConfig = _build(cls, built)
        return config


SECTIONS: dict[str, Any] = {
    "scheme": Scheme,
    "calibration": CalibrationConfig,
    "window": WindowConfig,
    "transforms": TransformConfig,
    "reconstruction": ReconstructionConfig,
}
"""The fields of `QuantizeConfig` that are settings dataclasses themselves."""


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """`cls(**values)`; an unknown key is refused with the nearest known one."""
    known = [item.name for item in fields(cls)]
    if not isinstance(values, dict):
        raise UsageError(f"{cls.__name__} is not a table of settings.")
    for key in values:
        if key not in known:
            raise UsageError(f"unknown setting {key!r}{suggestion(key, known)}.")
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{cls.__name__}: {error}.") from error
