"""A model without weights: the modules of transformers on the meta device, matched with the tensors of a checkpoint.

`from_pretrained` is never called, and code that a checkpoint contains is never run.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cbqstream.checkpoint.tensors import ModelTensor
from cbqstream.errors import InputError, UsageError, shown
from cbqstream.models.configuration import class_for, model_type_of, read_configuration
from cbqstream.models.empty_weights import empty_weights
from cbqstream.models.experts import separate_experts
from cbqstream.models.families import FAMILIES, SmoothingPair, family_of, smoothing_pairs
from cbqstream.models.handover import Handover
from cbqstream.models.naming import StoredNames
from cbqstream.records import BlockSpec

_FURTHER_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Numbers of blocks that predict further tokens. They are stored after the blocks of the model, and copied."""
_LEARNED_LENGTHS = ("max_position_embeddings", "max_target_positions", "n_positions")
"""Settings that give the number of learned positions, under the names that families use."""
_USUAL_LENGTH = 2048
"""Length that is assumed of a model whose configuration has none."""


class MetaModel:
    """Names, shapes and modules of a model, without weights.

    Args:
        folder: folder of the model, for messages.
        config: content of its config.json.
        infos: dense tensors of the checkpoint, by name.
        blocks_path: module path of the list of transformer blocks; found by default.

    Raises:
        InputError: the architecture is unknown, the configuration is not plausible, or a tensor is missing or has another shape.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        infos: Mapping[str, ModelTensor],
        blocks_path: str | None = None,
    ) -> None:
        self.folder = folder
        model_type = model_type_of(config)
        self.is_tested = model_type in FAMILIES
        self.family = family_of(model_type)
        self.config: Any = read_configuration(folder, config, len(infos))
        self.text_config: Any = self.config.get_text_config()
        """Configuration of the text model, which is a part of that of a multimodal model."""
        try:
            with empty_weights():
                self.hf_model: Any = class_for(self.config, config)._from_config(self.config).eval()
            self.text_model: Any = self._find_text_model()
            """Model that computes logits from tokens: `hf_model`, or the causal language model in it."""
            self.blocks_path: str = blocks_path or self._find_blocks()
            layers = self._blocks()
        except InputError:
            raise
        except Exception as error:
            path = folder / "config.json"
            raise InputError(path, f"does not describe a {model_type} model: {shown(str(error))}") from error
        whole = self.hf_model.state_dict()
        try:
            for block in layers:
                separate_experts(block, self.family.experts)
        except ValueError as error:
            raise InputError(folder / "config.json", f"{error}. Use another model.") from error
        self._stored = StoredNames(folder, self.hf_model, whole, infos)
        self._float32_names = _float32_names(self.hf_model)
        """Matches the names of parameters that transformers keeps in float32, which are not quantized."""
        self.templates: list[nn.Module] = list(layers)
        self.blocks = tuple(self._block_spec(index, block) for index, block in enumerate(self.templates))
        if not any(spec.linears for spec in self.blocks):
            raise InputError(
                folder / "config.json",
                f"the blocks of {type(self.hf_model).__name__} have no linear layers (those of GPT-2 are Conv1D). Use another model.",
            )
        self.left_out: Sequence[Mapping[str, str]] = [{} for _ in self.blocks]
        """For each block, its linear layers that cannot be quantized, by their name in the block, with the reason."""
        self._refuse_extra_blocks()
        for index in range(len(layers)):
            layers[index] = nn.Identity()
        self.outer: Mapping[str, str] = self._outer_tensors()
        self.dense: Mapping[str, ModelTensor] = infos
        """Dense tensors of the checkpoint by name, in its own layout."""
        self.infos: Mapping[str, ModelTensor] = self._stored.view()
        """Dense tensors by name, in the layout of the model."""
        self.handover = Handover(int(self.text_config.hidden_size))
        """Facts about the values that the blocks hand each other. A trial of the code of the model finds them (`probe.py`)."""

    def leave_out(self, layers: Sequence[Mapping[str, str]]) -> None:
        """Leave linear layers in full precision.

        Args:
            layers: for each block, the layers by their name in the block, with the reason.
        """
        self.left_out = layers
        self.blocks = tuple(
            replace(spec, linears=tuple(name for name in spec.linears if name not in left_out))
            for spec, left_out in zip(self.blocks, layers, strict=True)
        )

    def smoothing_pairs(self, index: int) -> tuple[SmoothingPair, ...]:
        """Smoothing pairs of block `index`, without those whose smoothed layer has no weight."""
        modules = dict(self.templates[index].named_modules())
        found = smoothing_pairs(self.family, self.text_config, modules.keys())
        return tuple(pair for pair in found if getattr(modules[pair.smooth_layer], "weight", None) is not None)

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states that the blocks hand on."""
        return self.handover.width

    @property
    def never_quantized(self) -> tuple[str, ...]:
        """Module paths of matrices that no window quantizes: linear layers outside the blocks, such as the head, and routers."""
        outside = (name for name, module in self.hf_model.named_modules() if isinstance(module, nn.Linear))
        inside = (
            f"{spec.prefix}.{name}"
            for spec, block in zip(self.blocks, self.templates, strict=True)
            for name, module in block.named_modules()
            if name not in spec.linears and len(getattr(getattr(module, "weight", None), "shape", ())) == 2
        )
        return (*outside, *inside)

    @property
    def embedding(self) -> str:
        """Name of the weight of the embedding in the checkpoint."""
        return self.outer[f"{path_of(self.hf_model, self.text_model.get_input_embeddings())}.weight"]

    @property
    def head(self) -> tuple[str, str]:
        """Module path of the head, and name of its weight in the checkpoint.

        If config.json ties the head to the embedding, the name is that of the embedding, unless the checkpoint has a head of its own.
        """
        path = path_of(self.hf_model, self.text_model.get_output_embeddings())
        return path, self.outer[f"{path}.weight"]

    @property
    def is_head_tied(self) -> bool:
        """Whether config.json ties the head to the embeddings."""
        return f"{self.head[0]}.weight" in self.hf_model.all_tied_weights_keys

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.text_config.vocab_size)

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a text, from the configuration of the model; 2,048 if the configuration has none."""
        known = (getattr(self.text_config, name, None) for name in ("max_position_embeddings", "seq_length"))
        return int(next((length for length in known if length), _USUAL_LENGTH))

    def check_length(self, seq_len: int) -> None:
        """Check that segments are not longer than the learned positions of the model. Computed positions have no limit.

        Raises:
            UsageError: `seq_len` exceeds the learned positions, or is below 2, so that no token is predicted.
        """
        tokens = self.text_model.get_input_embeddings()
        tables = {
            path: module
            for path, module in self.hf_model.named_modules()
            if isinstance(module, nn.Embedding) and module is not tokens and f"{path}.weight" in self.outer
        }
        known = (getattr(self.text_config, name, None) for name in _LEARNED_LENGTHS)
        longest = next((length for length in known if length), None) if tables else None
        for module in tables.values():
            if module.num_embeddings == longest and module.padding_idx is not None:
                longest -= module.padding_idx + 1  # the first position is the one after that of the padding
        if seq_len < 2 or (longest is not None and seq_len > longest):
            most = " or more" if longest is None else f" to {longest}, the model's positions"
            raise UsageError(f"seq_len is {seq_len}. It must be 2{most}.")

    def _find_text_model(self) -> Any:
        """The model, or a causal language model in it that some multimodal models contain as a whole.

        Raises:
            InputError: there is no output embedding.
        """
        models: list[Any] = [module for module in self.hf_model.modules() if isinstance(module, PreTrainedModel)]
        inner = [module for module in models[1:] if module.get_output_embeddings() is not None]
        if not inner and self.hf_model.get_output_embeddings() is None:
            problem = f"{type(self.hf_model).__name__} has no output embedding. Use another model."
            raise InputError(self.folder / "config.json", problem)
        return inner[0] if len(inner) == 1 else self.hf_model

    def _find_blocks(self) -> str:
        """Module path of the list with the most weights among the lists of the text model whose length is the number of blocks.

        Raises:
            InputError: there is no list of that length.
        """
        # blocks of LongCat have two layers of attention each, which num_hidden_layers counts
        number = getattr(self.text_config, "num_layers", None) or self.text_config.num_hidden_layers
        lists = {
            name: sum(value.numel() for value in module.parameters())
            for name, module in self.hf_model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == number
        }
        if not lists:
            problem = f"no list of {number} blocks in {type(self.hf_model).__name__}"
            raise InputError(self.folder / "config.json", f"{problem}. Give its path with --blocks-path.")
        text = [
            f"{name}."
            for name, module in self.hf_model.named_modules()
            if isinstance(module, PreTrainedModel) and type(module.config) is type(self.text_config) and name
        ]
        inside = {name: size for name, size in lists.items() if name.startswith(tuple(text))}
        return str(max((inside or lists).items(), key=itemgetter(1))[0])

    def _blocks(self) -> nn.ModuleList:
        """The list of blocks.

        Raises:
            InputError: `blocks_path` is not the path of a list of modules.
        """
        try:
            layers = self.hf_model.get_submodule(self.blocks_path)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            lists = [name for name, module in self.hf_model.named_modules() if isinstance(module, nn.ModuleList)]
            problem = f'--blocks-path "{shown(self.blocks_path)}" is not a list of blocks. Lists: {", ".join(lists[:5]) or "none"}.'
            raise InputError(self.folder / "config.json", problem)
        return layers

    def _block_spec(self, index: int, block: nn.Module) -> BlockSpec:
        """Names of the tensors and linear layers of a block.

        Raises:
            InputError: a tensor is missing from the checkpoint, or has another shape.
        """
        prefix = f"{self.blocks_path}.{index}"
        names = {
            local: self._stored.require(f"{prefix}.{local}", tuple(value.shape))
            for local, value in block.state_dict().items()
        }
        linears = tuple(
            local
            for local, module in block.named_modules()
            if isinstance(module, nn.Linear)
            and not {"router", *self.family.never_quantized} & {local.rpartition(".")[2], *local.split(".")[:-1]}
            and self._float32_names.search(f"{prefix}.{local}.weight") is None
        )
        return BlockSpec(index, prefix, names, linears)

    def _outer_tensors(self) -> dict[str, str]:
        """Name in the checkpoint of every parameter outside the blocks that text passes, by its name in the model.

        These are the parameters of the head and of the model that contains the blocks. In a model for text alone, they are all parameters
        outside the blocks.

        Raises:
            InputError: a tensor is missing from the checkpoint, or has another shape.
        """
        around = {
            f"{name}." if name else ""
            for name, module in self.hf_model.named_modules()
            if isinstance(module, PreTrainedModel) and f"{self.blocks_path}.".startswith(f"{name}." if name else "")
        }
        scope = "" if self.text_config is self.config else max(around, key=len)
        towers = [
            f"{name}."
            for name, module in self.hf_model.named_modules()
            if isinstance(module, PreTrainedModel) and name and f"{name}." not in around
        ]
        head = {id(value) for value in self.text_model.get_output_embeddings().parameters()}
        return {
            name: self._stored.require(name, tuple(value.shape))
            for name, value in self.hf_model.named_parameters(remove_duplicate=False)
            if (name.startswith(scope) and not name.startswith(tuple(towers))) or id(value) in head
        }

    def _refuse_extra_blocks(self) -> None:
        """Check that the checkpoint has no blocks besides those of the model.

        Raises:
            InputError: it has more blocks.
        """
        # names that transformers ignores, such as those of layers that predict further tokens
        ignored = getattr(self.hf_model, "_keys_to_ignore_on_load_unexpected", None) or ()
        prefix = self.blocks[0].prefix.removesuffix("0")
        held = {
            int(part)
            for name in self._stored
            if name.startswith(prefix)
            and (part := name[len(prefix) :].split(".")[0]).isdigit()
            and not any(re.search(pattern, name) for pattern in ignored)
        }
        further = max(int(getattr(self.text_config, name, None) or 0) for name in _FURTHER_BLOCKS)
        if len(held) > len(self.blocks) + further:
            raise InputError(
                self.folder, f"config.json describes {len(self.blocks)} blocks, but the weights have {len(held)}."
            )


def _float32_names(hf_model: Any) -> re.Pattern[str]:
    """Pattern of the names of parameters that transformers keeps in float32."""
    lists = (getattr(hf_model, f"_keep_in_fp32_modules{end}", None) or () for end in ("", "_strict"))
    names = "|".join(re.escape(name) for each in lists for name in sorted(each)) or "$^"
    return re.compile(rf"(?:^|\.)({names})(?:\.|$)")


def path_of(hf_model: nn.Module, wanted: nn.Module) -> str:
    """Module path of a module of a model."""
    path: str = next(name for name, module in hf_model.named_modules() if module is wanted)
    return path
