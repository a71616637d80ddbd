"""Reference kernels for vLLM on CPUs for which its own are missing or inexact.

vLLM 0.32 needs AVX-512 for linear layers of 4 bits, and AMX for experts of 4 bits. Its layers of 8 bits are inexact on CPUs without VNNI.
The reference kernels get the weights as vLLM loaded and repacked them: weights are dequantized in float32,
rounded to the dtype of the inputs if those are not quantized, and products are summed in float32. The kernel of vLLM for experts rounds
the inputs to 8 bits, which the reference does not. I is the number of inputs of a layer, O of outputs, G of groups, T of tokens.
"""

import torch
from torch import Tensor

CODES = 8
"""Codes of 4 bits in a word of 32 bits."""
LINEAR = "cpu_gemm_wna16(Tensor x, Tensor weight, Tensor(a!) out, Tensor scales, Tensor? zeros, Tensor? bias, int codes, str isa) -> ()"
REPACK = (
    "convert_weight_packed_scale_zp(Tensor weight, Tensor zeros, Tensor scales, int order) -> (Tensor, Tensor, Tensor)"
)
EXPERTS = (
    "fused_experts_cpu(Tensor(a!) out, Tensor x, Tensor w1, Tensor w2, Tensor weights, Tensor ids, int method, Tensor? s1, Tensor? s2,"
    " Tensor? z1, Tensor? z2, Tensor? a1, int[]? block, Tensor? b1, Tensor? b2, float? alpha, float? limit, bool vnni) -> ()"
)
_GPTQ_ORDER = 1
_DEQUANTIZED: dict[int, Tensor] = {}
"""Dequantized weights, by the address of their codes, which stay where they are after loading."""
used: set[str] = set()
"""Kinds of layers that the reference kernels computed."""
_LIBRARY = torch.library.Library("_C", "FRAGMENT")  # definitions live as long as this object


def unpack(words: Tensor) -> Tensor:
    """Codes 0 to 15, int32 [..., N, 8], of words [..., N]; the first code is in the lowest bits."""
    return (words.unsqueeze(-1) >> (4 * torch.arange(CODES, dtype=torch.int32))) & 15


def dequantize(codes_IO: Tensor, zeros_GO: Tensor | int, scales_GO: Tensor) -> Tensor:
    """Weights [I, O] in float32, rounded to the dtype of the scales."""
    size = len(codes_IO) // len(scales_GO)
    zeros = zeros_GO if isinstance(zeros_GO, int) else zeros_GO.repeat_interleave(size, 0)
    values = (codes_IO - zeros) * scales_GO.float().repeat_interleave(size, 0)
    return values.to(scales_GO.dtype).float()


def linear(
    x: Tensor, weight: Tensor, out: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *_
) -> None:
    """Linear layer. `weight` [O/16, 2 I] has two words for the 16 outputs of a block in each of the I rows."""
    used.add("linear")
    if weight.data_ptr() not in _DEQUANTIZED:
        codes_IO = unpack(weight.view(len(weight), -1, 2)).flatten(2).permute(1, 0, 2).flatten(1)
        zeros_GO = 8 if zeros is None else unpack(zeros).flatten(1)
        _DEQUANTIZED[weight.data_ptr()] = dequantize(codes_IO, zeros_GO, scales)
    y = x.float() @ _DEQUANTIZED[weight.data_ptr()]
    out.copy_(y if bias is None else y + bias)


def repack(weight: Tensor, zeros: Tensor, scales: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of experts as they are."""
    assert order == _GPTQ_ORDER, order
    return weight.clone(), zeros.clone(), scales.clone()


def expert_weight(words: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """Weight [I, O] of an expert, from words [I/8, O], zero points minus one [G, O/8] and scales [G, O]."""
    if words.data_ptr() not in _DEQUANTIZED:
        codes_IO = unpack(words).transpose(1, 2).flatten(0, 1)
        _DEQUANTIZED[words.data_ptr()] = dequantize(codes_IO, unpack(zeros).flatten(1) + 1, scales)
    return _DEQUANTIZED[words.data_ptr()]


def experts(out: Tensor, x: Tensor, w1, w2, weights: Tensor, ids: Tensor, method, s1, s2, z1, z2, *_) -> None:
    """Sum [T, O] of the gated experts of each token, with their weights [T, K]. `w1` holds gate and up."""
    used.add("experts")
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(len(w1)):
        tokens, places = torch.where(ids == expert)
        gate, up = (x[tokens].float() @ expert_weight(w1[expert], z1[expert], s1[expert])).chunk(2, dim=-1)
        inner = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        y = inner.float() @ expert_weight(w2[expert], z2[expert], s2[expert])
        total.index_add_(0, tokens, y * weights[tokens, places, None])
    out.copy_(total)


def keep_int8(kernel, layer) -> None:
    """Dequantize a weight of 8 bits per channel, in place of repacking it."""
    weight, scale = (getattr(layer, name) for name in kernel.layer_param_names[:2])
    layer.dequantized = weight.float() * scale.float()


def int8_linear(_, layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer of 8 bits. vLLM quantizes the inputs, per token."""
    from vllm import _custom_ops

    used.add("linear")
    codes, scales, _ = _custom_ops.onednn_scaled_int8_quant(x)
    y = (codes.float() * scales) @ layer.dequantized.T
    return (y if bias is None else y + bias).to(x.dtype)


def install() -> None:
    """Let vLLM use the reference kernels for what this CPU lacks."""
    import vllm.platforms
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

    vllm.platforms.current_platform.import_kernels()
    for schema, kernel in ((LINEAR, linear), (REPACK, repack), (EXPERTS, experts)):
        name = schema[: schema.index("(")]
        if not hasattr(torch.ops._C, name):
            _LIBRARY.define(schema)
            _LIBRARY.impl(name, kernel, "CPU")
    CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    if not torch.cpu._is_vnni_supported():
        CPUInt8ScaledMMLinearKernel.process_weights_after_loading = keep_int8
        CPUInt8ScaledMMLinearKernel.apply_weights = int8_linear
