"""A model without weights: transformers' own modules on the meta device, matched against the tensors that exist.

`from_pretrained` is never called and no code of the checkpoint is run: the configuration is built from a known `model_type`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.families import FAMILIES
from cbqstream.records import BlockSpec

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OTHER_SIZES = ("intermediate_size", "ffn_dim", "head_dim", "num_key_value_heads", "word_embed_proj_dim")
"""Not every architecture has them, and they may be null."""
_NEVER_READ = ("auto_map", "quantization_config", "model_type", "transformers_version", "architectures")


def is_size(value: Any) -> bool:
    """Whether a value of config.json can be the size of something."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20


class ModelSkeleton:
    """Names, shapes and modules of a model, without weights.

    Args:
        folder: for messages.
        config: content of its config.json.
        tensors: shape of each dense tensor that can be read, by name.

    Raises:
        InputError: the architecture is unknown, the configuration is not plausible, or tensors are missing or of another shape.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
        self.folder = folder
        self._tensors = tensors
        path = folder / "config.json"
        model_type = str(config.get("model_type"))
        if model_type not in FAMILIES and config.get("auto_map"):
            raise InputError(path, f'architecture "{shown(model_type)}" needs remote code, which is never run.')
        if model_type not in FAMILIES:
            raise InputError(
                path, f'architecture "{shown(model_type)}" is not supported (known: {", ".join(FAMILIES)}).'
            )
        for key in (*_SIZES, *(key for key in _OTHER_SIZES if config.get(key) is not None)):
            if not is_size(config.get(key)):
                raise InputError(
                    path, f"{key} is {shown(str(config.get(key)))}, it must be a whole number from 1 to {1 << 20:,}."
                )
        if config["num_hidden_layers"] > len(tensors):
            raise InputError(
                path,
                f"num_hidden_layers is {config['num_hidden_layers']:,}, the weights hold {len(tensors):,} tensors.",
            )
        kept = {
            key: value
            for key, value in config.items()
            if key not in _NEVER_READ
            and not key.startswith("_")
            and "kernel" not in key
            and "attn_implementation" not in key
        }
        try:
            self.config: Any = CONFIG_MAPPING[model_type](**kept)
            with init_empty_weights(include_buffers=False):
                auto: Any = AutoModelForCausalLM
                self.shell: Any = auto.from_config(self.config, attn_implementation="sdpa").eval()
        except Exception as error:
            raise InputError(path, f"does not describe a {model_type} model: {shown(str(error))}") from error
        family = FAMILIES[model_type]
        self.blocks_path = family.blocks
        self.folds = family.folds_of(self.config)
        layers = self.shell.get_submodule(self.blocks_path)
        self.templates: list[nn.Module] = list(layers)
        self.blocks = tuple(self._block_spec(index, block) for index, block in enumerate(self.templates))
        self._refuse_extra_blocks()
        for index in range(len(layers)):
            layers[index] = nn.Identity()
        self.outer: Mapping[str, str] = self._outer_tensors()

    @property
    def hidden_size(self) -> int:
        """D, the width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def outer_linears(self) -> tuple[str, ...]:
        """Linear layers outside the blocks, the head among them; they are never quantized."""
        return tuple(name for name, module in self.shell.named_modules() if isinstance(module, nn.Linear))

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self.config.vocab_size)

    def check_length(self, seq_len: int) -> None:
        """Refuse segments that the model has no positions for. Where positions are computed there is no limit.

        Raises:
            UsageError: the segment is too long, or too short to predict anything.
        """
        learned = any(name.endswith("embed_positions.weight") for name, _ in self.shell.named_parameters())
        if seq_len < 2 or (learned and seq_len > self.config.max_position_embeddings):
            most = f" to {self.config.max_position_embeddings}, the model's positions" if learned else " or more"
            raise UsageError(f"seq_len is {seq_len}. It must be 2{most}.")

    def _block_spec(self, index: int, block: nn.Module) -> BlockSpec:
        prefix = f"{self.blocks_path}.{index}"
        names = {
            local: self._stored_name(f"{prefix}.{local}", tuple(value.shape))
            for local, value in block.named_parameters()
        }
        linears = tuple(local for local, module in block.named_modules() if isinstance(module, nn.Linear))
        return BlockSpec(index, prefix, names, linears)

    def _outer_tensors(self) -> dict[str, str]:
        """Name in the checkpoint of every parameter outside the blocks, by its name in the model; tied ones by what they are tied to."""
        tied: Mapping[str, str] = getattr(self.shell, "_tied_weights_keys", None) or {}
        names = {}
        for name, value in self.shell.named_parameters(remove_duplicate=False):
            twin = tied.get(name) if self.config.tie_word_embeddings else None
            names[name] = self._stored_name(twin or name, tuple(value.shape))
        return names

    def _stored_name(self, name: str, shape: tuple[int, ...]) -> str:
        """`name` as the checkpoint has it: some leave out the prefix of the base model."""
        stored = name if name in self._tensors else name.removeprefix(f"{self.shell.base_model_prefix}.")
        if stored not in self._tensors:
            raise InputError(self.folder, "missing from the weights, config.json needs it.", tensor=name)
        if self._tensors[stored] != shape:
            found, needed = list(self._tensors[stored]), list(shape)
            raise InputError(self.folder, f"shape {found}, config.json needs {needed}.", tensor=stored)
        return stored

    def _refuse_extra_blocks(self) -> None:
        prefix = f"{self.blocks_path}."
        held = {
            int(part)
            for name in self._tensors
            if name.startswith(prefix) and (part := name[len(prefix) :].split(".")[0]).isdigit()
        }
        if len(held) > len(self.blocks):
            raise InputError(self.folder, f"config.json says {len(self.blocks)} blocks, weights hold {len(held)}.")
