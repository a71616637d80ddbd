"""Tensors of a quantized model as dense ones, which are decoded one at a time as they are read.

A new way of storing weights is a `Decoder` in a file of `decoders/`, and a row of `DECODERS`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from cbqstream.checkpoint.decoders.awq import AWQ
from cbqstream.checkpoint.decoders.compressed import COMPRESSED
from cbqstream.checkpoint.decoders.decoder import REPAIR, Decoder, Quantized
from cbqstream.checkpoint.decoders.fp8 import FP8
from cbqstream.checkpoint.decoders.gptq import GPTQ
from cbqstream.checkpoint.decoders.modelopt import MODELOPT, algorithm_of
from cbqstream.checkpoint.decoders.mxfp4 import MXFP4
from cbqstream.checkpoint.folder import find_quantization, quant_method_of
from cbqstream.checkpoint.tensors import ModelTensor, TensorInfo
from cbqstream.errors import InputError, shown

DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        "awq": AWQ,
        "compressed-tensors": COMPRESSED,
        "fbgemm_fp8": FP8,
        "fp8": FP8,
        "gptq": GPTQ,
        "modelopt": MODELOPT,
        "modelopt_fp4": MODELOPT,
        "mxfp4": MXFP4,
    }
)
"""Decoders by the `quant_method` of a quantization_config."""

_OF_INPUTS = frozenset(
    (
        *("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale", "qscale_act"),
        *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point"),
    )
)
"""Last parts of the names of scales of inputs, outputs, keys and values, which are left out."""
_OF_INPUTS_OF_EXPERTS = ("_activation_scale", "_input_scale")
"""Ends that such names have after the name of a fused weight."""
_ONLY_PARTS = ("_scale_inv", "_scales", "_blocks")
"""Ends of names that no other tensors have, if the weight has another name than `NAME.weight`."""
_REFUSED = ".pre_quant_scale"
"""End of the name of a factor for the inputs of a layer, without which its weight computes something else."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def decoded_tensors(
    folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> Mapping[str, ModelTensor]:
    """All tensors of a model, by name. Quantized weights are derived from their stored parts, which are left out themselves.

    Weights without a scale, and all other tensors, stay as they are stored. Nothing but headers is read.

    Args:
        folder: folder of the model.
        config: content of its config.json.
        infos: every stored tensor, by name.

    Returns:
        `infos` itself if the model is not quantized.

    Raises:
        InputError: the model is quantized in a way that is not read, or the tensors of a weight do not fit together.
    """
    found = find_quantization(folder, config)
    if found is None:
        return infos
    place, quantization = found
    method = quant_method_of(quantization)
    if method not in DECODERS:
        problem = f"the model is already quantized ({method}), which is not decoded"
        raise InputError(place, f"{problem}. Give the original model, or one in {', '.join(sorted(DECODERS))}.")
    decoder = DECODERS[method]
    make = decoder.open(Quantized(place, quantization, _model_dtype(config)))
    held = _parts(decoder, infos)
    for info in (info for parts in held.values() for info in parts.values() if 0 in info.shape):
        raise InputError(info.file, f"has shape {list(info.shape)}, without values. {REPAIR}", tensor=info.name)
    tensors: dict[str, ModelTensor] = {name: make(name, parts) for name, parts in held.items()}
    used = {info.name for parts in held.values() for info in parts.values()}
    for name, info in infos.items():
        if name in used or _is_of_inputs(name, tensors):
            continue
        if name in tensors:
            raise InputError(info.file, f"is stored beside its quantized form. {REPAIR}", tensor=name)
        if name.endswith(_REFUSED):
            problem = "is a factor for the inputs of a quantized layer, which is not read. Give the original model."
            raise InputError(info.file, problem, tensor=name)
        _refuse_orphan(decoder, info, infos)
        tensors[name] = info
    if not held and not any(info.stored_dtype in decoder.in_place for info in infos.values()):
        problem = f"the model is already quantized ({method}) by this description, but none of its weights is"
        raise InputError(place, f"{problem}. Remove the description if the weights are dense, or download them again.")
    return tensors


def quantizes_inputs(quantization: Mapping[str, Any]) -> bool:
    """Whether inference engines also quantize the inputs of the layers of a model, which decoded weights do not.

    Args:
        quantization: the `quantization_config` of the model.
    """
    groups = quantization.get("config_groups")
    of_groups = groups.values() if isinstance(groups, dict) else ()
    if any(isinstance(group, dict) and group.get("input_activations") for group in of_groups):
        return True
    method, algorithm = quant_method_of(quantization), str(algorithm_of(quantization))
    return "fp8" in method or (method.startswith("modelopt") and not algorithm.startswith("W4A16"))


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Dtype of a model by its config.json, or by that of its text model; bf16 if there is none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            dtype = _DTYPES.get(str(part.get(key)).removeprefix("torch."))
            if dtype is not None:
                return dtype
    return torch.bfloat16


def _parts(decoder: Decoder, infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The stored parts of every quantized weight, by the name of the weight; the part with the codes is the first.

    Codes that are stored under the name of the weight count only if they have a scale.
    """
    held: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        for weight, part in _weights_of(decoder, name):
            held.setdefault(weight, {})[part] = info
    for name in held.keys() & infos.keys():
        if infos[name].stored_dtype in decoder.in_place:
            held[name].setdefault(decoder.codes, infos[name])
    return {
        name: {decoder.codes: parts[decoder.codes], **parts} for name, parts in held.items() if decoder.codes in parts
    }


def _weights_of(decoder: Decoder, name: str) -> Iterator[tuple[str, str]]:
    """The weight to which a stored tensor belongs by its name, and which part of it; at most one."""
    if name.rpartition(".")[2] in _OF_INPUTS:
        return
    for end, (replaced, part) in decoder.ends.items():
        if name.endswith(end):
            yield name.removesuffix(end) + replaced, part
            return


def _is_of_inputs(name: str, weights: Mapping[str, ModelTensor]) -> bool:
    """Whether a tensor is a scale of inputs, outputs, keys or values."""
    if name.rpartition(".")[2] in _OF_INPUTS:
        return True
    return any(name.removesuffix(end) in weights for end in _OF_INPUTS_OF_EXPERTS if name.endswith(end))


def _refuse_orphan(decoder: Decoder, info: TensorInfo, infos: Mapping[str, TensorInfo]) -> None:
    """Check that a tensor which is no part of a decoded weight does not look like one.

    Raises:
        InputError: it does: its weight is missing, or is not stored in codes.
    """
    for weight, _ in _weights_of(decoder, info.name):
        if weight in infos and decoder.in_place:
            found = f'"{shown(weight)}" is stored as {infos[weight].stored_dtype}, which is not quantized'
            raise InputError(info.file, f"is a scale, but {found}. {REPAIR}", tensor=info.name)
        # other tensors, such as `logit_scale`, may have names that end like those of parts
        if info.name.endswith(_ONLY_PARTS) or (weight.endswith(".weight") and not info.name.endswith(".scale")):
            problem = f'is a part of the quantized weight "{shown(weight)}", whose codes are missing'
            raise InputError(info.file, f"{problem}. {REPAIR}", tensor=info.name)
