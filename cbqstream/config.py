"""Settings of a run: frozen, checked when they are made, and never changed or completed later. No torch here."""

import difflib
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from cbqstream.errors import UsageError

RoundingMode = Literal["nearest", "lora_rounding", "signround"]
ScaleInit = Literal["minmax", "search"]
Schedule = Literal["linear", "cosine"]
ActivationStrategy = Literal["token", "tensor"]
FoldWhen = Literal["never", "quantized", "always"]
OutlierVariant = Literal["paper", "huawei", "search"]
Kernels = Literal["auto", "plain"]


_COMMON_GROUPS = (128, 64, 32, 16, 96, 48, 8)
"""The first four are what other formats and engines take too."""


def _require(ok: bool, message: str) -> None:  # noqa: FBT001
    if not ok:
        raise UsageError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How a linear layer computes: weights stored as `w = (q - zero_point) * scale`, and inputs in full precision or quantized."""

    num_bits: int
    """Width of a code, 2 to 8."""
    group_size: int | None = 128
    """Columns of one row that share a scale; None is one scale per row (per channel)."""
    symmetric: bool = True
    """Weights have no zero point. The whole range of codes is used either way."""
    activation_bits: int | None = None
    """Width of the inputs of quantized layers, symmetric; None leaves them as they are."""
    activation_strategy: ActivationStrategy = "token"
    """`token`: a scale for every token, from its values as they come; `tensor`: one step size for a layer, learned."""

    _PATTERN: ClassVar[re.Pattern[str]] = re.compile(r"W([2-8])A(4|8|16)")

    def __post_init__(self) -> None:
        _require(2 <= self.num_bits <= 8, f"num_bits is {self.num_bits}. It must be 2 to 8.")
        _require(
            self.activation_strategy in get_args(ActivationStrategy),
            f"activation strategy {self.activation_strategy!r} is not token or tensor.",
        )
        _require(
            self.activation_bits in (None, 4, 8),
            f"activation_bits is {self.activation_bits}. It must be 4, 8 or None.",
        )
        _require(
            self.group_size is None or (self.group_size >= 8 and self.group_size % 8 == 0),
            f"group_size is {self.group_size}. It must be a multiple of 8, or -1 for one scale per channel.",
        )

    @classmethod
    def named(cls, name: str, **options: Any) -> "Scheme":
        """The scheme of a name such as W4A16; other fields as given.

        Raises:
            UsageError: the name is not of a scheme that is supported.
        """
        match = cls._PATTERN.fullmatch(name.upper())
        if match is None:
            raise UsageError(f"scheme {name!r} is not supported. Use W2 to W8 with A16, A8 or A4, such as W4A16.")
        activation_bits = None if match[2] == "16" else int(match[2])
        return cls(num_bits=int(match[1]), activation_bits=activation_bits, **options)

    def require_whole_groups(self, layer: str, columns: int) -> None:
        """Refuse a layer whose columns leave a part of a group.

        Raises:
            UsageError: they do.
        """
        size = self.group_size
        if size is not None and columns % size:
            fitting = [other for other in _COMMON_GROUPS if columns % other == 0 and other < size]
            fits = f"{fitting[0]} fits; or " if fitting else ""
            raise UsageError(
                f"group size {size} does not divide the {columns} columns of {layer}. {fits}use -1 (per channel)."
            )

    @property
    def name(self) -> str:
        """What `named` takes."""
        return f"W{self.num_bits}A{self.activation_bits or 16}"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.num_bits - 1)) - 1


@dataclass(frozen=True, slots=True)
class LayerSchemes:
    """The scheme of each layer of a model."""

    default: Scheme
    others: tuple[tuple[str, Scheme], ...] = ()
    """Regular expressions of whole module paths, and the scheme of the layers that they match."""

    def of(self, path: str) -> Scheme:
        """The scheme of the layer with a module path.

        Raises:
            UsageError: two others match it that differ.
        """
        found = {scheme for pattern, scheme in self.others if re.fullmatch(pattern, path)}
        if len(found) > 1:
            raise UsageError(f"{path}: two overrides match it. Make them more exact.")
        return found.pop() if found else self.default


def path_pattern(pattern: str) -> str:
    """Regular expression of the module paths that hold `pattern` as whole parts, in which * is any text and ? any character."""
    body = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return rf"(?:.*\.)?{body}(?:\..*)?"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """Which text the quantizer learns from."""

    dataset: str
    """A text, jsonl or parquet file, or token ids in .npy or .safetensors."""
    num_samples: int = 128
    """Segments."""
    seq_len: int = 2048
    """Tokens in a segment."""
    all_experts: bool = False
    """Whether statistics are gathered with every token sent to every expert, not only to those that the router chooses."""

    def __post_init__(self) -> None:
        _require(self.num_samples >= 1, f"num_samples is {self.num_samples}. It must be at least 1.")
        _require(self.seq_len >= 2, f"seq_len is {self.seq_len}. It must be at least 2.")


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """How the transformer blocks are cut into windows."""

    size: int = 2
    """Blocks that are optimized together."""
    overlap: int = 1
    """Blocks that a window shares with the next one."""

    def __post_init__(self) -> None:
        _require(self.size >= 1, f"window size is {self.size}. It must be at least 1.")
        _require(
            0 <= self.overlap < self.size,
            f"window overlap is {self.overlap}. It must be 0 to {self.size - 1} for a window of {self.size} blocks.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierConfig:
    """What is done about outliers before a window is optimized (formulas in `numerics/outliers.py`)."""

    weights: bool = False
    """Truncate the outliers of every weight to its largest reserved magnitude."""
    activations: FoldWhen = "quantized"
    """When channels are divided by powers of two, and the weights that read them multiplied by the same: `quantized` is where the scheme
    quantizes activations."""
    variant: OutlierVariant = "search"
    """Which channels, and by how much: the paper's rule for outliers, that of Huawei's public code, or `search`, which scales every channel
    by a power of its size and takes the power with the least output error."""
    lambda1: float = 1.5
    """Interquartile ranges above the upper quartile where candidates begin."""
    lambda2: float = 1.0
    """What the variance of the reserved candidates counts beside the gap."""

    def __post_init__(self) -> None:
        _require(
            self.activations in get_args(FoldWhen),
            f"activations {self.activations!r} is not never, quantized or always.",
        )
        _require(self.variant in get_args(OutlierVariant), f"variant {self.variant!r} is not paper, huawei or search.")
        for name in ("lambda1", "lambda2"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}. It must not be negative.")

    def folds(self, scheme: Scheme) -> bool:
        """Whether channels are rescaled under a scheme."""
        return self.activations == "always" or (self.activations == "quantized" and scheme.activation_bits is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig:
    """How a window is optimized (design: method; formulas in `numerics/`)."""

    rounding: RoundingMode = "signround"
    """`full`: one value per weight, sign-SGD; `lora`: low-rank AdaRound; `none`: round to nearest, nothing is learned."""
    init: ScaleInit = "search"
    """Where scales start: `minmax` of the weights, or `search` for the smallest second-moment-weighted error."""
    schedule: Schedule = "linear"
    """How learning rates fall from step to step: in a line, or along half a cosine, both to zero."""
    epochs: int = 6
    """Passes over the calibration segments, per window."""
    batch_size: int = 4
    """Segments in one step."""
    max_shift: float = 0.25
    """`full`: how far a value can move in one window, in units of the step size; its rate falls linearly to zero."""
    rounding_lr: float = 1e-2
    """`lora`: Adam's learning rate of the two factors."""
    rounding_rank: int = 5
    """`lora`: rank of the factors."""
    scale_lr: float = 1e-3
    """Adam's learning rate of the logarithm of the step sizes, falling linearly to zero."""
    activation_scale_lr: float = 1e-4
    """The same for the step sizes of activations, where these are learned."""
    target_mix: float = 0.75
    """a: 1 imitates the original model on its own inputs, 0 on the inputs that the quantized prefix gives."""
    kl_weight: float = 0.0
    """Weight of the Kullback-Leibler term over the hidden dimension."""
    head_weight: float = 0.1
    """Weight of the divergence of the next-token distribution, in the window that ends with the last block; 0 leaves it out."""
    head_stride: int = 4
    """Every how many tokens the next-token distribution is looked at; each in its turn."""
    end_to_end_epochs: int = 0
    """Passes over the calibration segments after the last window, in which the step sizes of all blocks learn together."""
    end_to_end_lr: float = 2e-3
    """Adam's learning rate of the logarithm of the step sizes in these, falling linearly to zero."""
    penalty_weight: float = 0.1
    """`lora`: weight of the term that drives the rounding to 0 or 1."""
    kernels: Kernels = "auto"
    """What `full` computes its weights with: Triton on CUDA and torch on the CPU, or `plain` torch everywhere."""
    token_balance: float = 1.0
    """0: the squared error of every token counts as it is; 1: relative to the token's power."""
    channel_balance: float = 0.5
    """0: the squared error of every channel counts as it is; 1: relative to the channel's power."""
    robust_tokens: int = 0
    """Tokens of a segment, those with the largest target norm, that the loss leaves out."""

    def __post_init__(self) -> None:
        _require(
            self.rounding in get_args(RoundingMode),
            f"rounding {self.rounding!r} is not nearest, lora_rounding or signround.",
        )
        _require(self.init in get_args(ScaleInit), f"init {self.init!r} is not minmax or search.")
        _require(self.kernels in get_args(Kernels), f"kernels {self.kernels!r} is not auto or plain.")
        _require(self.schedule in get_args(Schedule), f"schedule {self.schedule!r} is not linear or cosine.")
        _require(self.epochs >= 0, f"epochs is {self.epochs}. It must be at least 0.")
        _require(self.end_to_end_epochs >= 0, f"end_to_end_epochs is {self.end_to_end_epochs}. It must be at least 0.")
        _require(self.batch_size >= 1, f"batch_size is {self.batch_size}. It must be at least 1.")
        _require(self.rounding_rank >= 1, f"rounding_rank is {self.rounding_rank}. It must be at least 1.")
        _require(self.head_stride >= 1, f"head_stride is {self.head_stride}. It must be at least 1.")
        for name in ("target_mix", "token_balance", "channel_balance"):
            _require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}. It must be 0 to 1.")
        _require(self.robust_tokens >= 0, f"robust_tokens is {self.robust_tokens}. It must be at least 0.")
        for name in (
            "max_shift",
            "rounding_lr",
            "scale_lr",
            "activation_scale_lr",
            "end_to_end_lr",
            "kl_weight",
            "head_weight",
            "penalty_weight",
        ):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}. It must not be negative.")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 16GiB, 1.5 GB or 800MiB.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size. Write it as 16GiB or 800MB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1))


_OVERRIDE = re.compile(r"(.+)=W([2-8])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    """Everything that `quantize` needs to know."""

    model: str
    """Source checkpoint: a folder with config.json and safetensors."""
    out: str
    """Folder to write; it must not exist, or be empty."""
    scheme: Scheme
    calibration: CalibrationConfig
    run_dir: str | None = None
    """Where the run keeps its state; OUT.run by default."""
    window: WindowConfig = field(default_factory=WindowConfig)
    outliers: OutlierConfig = field(default_factory=OutlierConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    blocks_path: str | None = None
    """Module path of the list of transformer blocks, for an architecture in which it is not found."""
    ignore: tuple[str, ...] = ()
    """Layers that stay in full precision: whole parts of their module path, with * and ?, such as `down_proj` or `layers.3.mlp.*`."""
    override: tuple[str, ...] = ()
    """Layers with weights of another width, as PATTERN=W8."""
    quantize_lm_head: bool = False
    """Whether the head is quantized too, to the nearest of searched scales; it must not be tied to the embeddings."""
    keep_first: int = 0
    """Blocks at the start that stay in full precision."""
    keep_last: int = 0
    """Blocks at the end that stay in full precision."""
    seed: int = 0
    """All randomness comes from this, the window and the purpose."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_ram: int | None = None
    """Bytes of resident memory that the run may take; what does not fit is refused before it starts."""
    max_vram: int | None = None
    """The same of device memory."""
    threads: int | None = None
    """CPU threads; the physical cores by default. Results depend on it in the last bits, so it is part of the run's identity."""

    def __post_init__(self) -> None:
        _require(self.keep_first >= 0, f"keep_first is {self.keep_first}. It must be at least 0.")
        _require(self.keep_last >= 0, f"keep_last is {self.keep_last}. It must be at least 0.")
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device {self.device!r} is not auto, cpu or cuda.",
        )
        for name in ("ignore", "override"):  # from JSON they come as lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for text in self.override:
            _require(_OVERRIDE.fullmatch(text) is not None, f"override {text!r} is not as PATTERN=W8.")
        for name in ("max_ram", "max_vram"):
            _require((getattr(self, name) or 1) > 0, f"{name} is {getattr(self, name)}. It must be more than 0.")
        _require(
            not self.quantize_lm_head or self.scheme.activation_bits is None,
            "--quantize-lm-head quantizes no inputs. Use a scheme with A16.",
        )
        _require(self.threads is None or self.threads >= 1, f"threads is {self.threads}. It must be at least 1.")

    @property
    def schemes(self) -> LayerSchemes:
        """Of the layers that are quantized."""
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
        nested = {
            "scheme": Scheme,
            "calibration": CalibrationConfig,
            "window": WindowConfig,
            "outliers": OutlierConfig,
            "reconstruction": ReconstructionConfig,
        }
        built = {key: _build(nested[key], value) if key in nested else value for key, value in values.items()}
        config: QuantizeConfig = _build(cls, built)
        return config


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """`cls(**values)`, with an unknown key refused by naming the nearest known one."""
    known = [item.name for item in fields(cls)]
    if not isinstance(values, dict):
        raise UsageError(f"{cls.__name__} is not a table of settings.")
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1)
            raise UsageError(f"unknown setting {key!r}{f' ({nearest[0]}?)' if nearest else ''}.")
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{cls.__name__}: {error}.") from error
