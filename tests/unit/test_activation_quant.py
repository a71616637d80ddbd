"""Quantization of layer inputs: comparison with compressed-tensors, worked examples, and gradients."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from cbqstream.numerics.activation_quant import quantize_per_tensor, quantize_per_token, starting_step


@pytest.mark.parametrize("num_bits", [4, 8])
def test_per_token_quantization_equals_compressed_tensors_bit_for_bit(num_bits):
    x = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 7).view(1, 7, 1)
    x[0, 0] = 0
    args = QuantizationArgs(num_bits=num_bits, symmetric=True, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(quantize_per_token(x, num_bits), fake_quantize(x, scale, zero_point, args))


def test_per_token_quantization_of_a_worked_example():
    x = torch.tensor([[7.5, -7.5, 1.4, 0.6], [0.0, 0.0, 0.0, 0.0]])
    assert quantize_per_token(x, 4).tolist() == [[7, -8, 1, 1], [0, 0, 0, 0]]


def test_per_token_quantization_passes_the_gradient_on_unchanged():
    x = torch.randn(2, 5, requires_grad=True)
    quantize_per_token(x, 4).mul(torch.arange(5.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(5.0).expand(2, 5))


def test_per_token_quantization_keeps_the_dtype():
    assert quantize_per_token(torch.randn(2, 8, dtype=torch.bfloat16), 8).dtype == torch.bfloat16


def test_per_tensor_quantization_and_its_gradients_for_a_worked_example():
    x = torch.tensor([3.0, -1.4, 100.0, -100.0], requires_grad=True)
    theta = torch.zeros(1, requires_grad=True)
    x_hat = quantize_per_tensor(x, theta, torch.tensor([2.0]), 4)
    assert x_hat.tolist() == [4, -2, 14, -16]  # 1.5 -> 2, -0.7 -> -1, 7, -8
    x_hat.sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]
    # d/ds: 2 - 1.5, -1 + 0.7, 7, -8; times ds/dtheta = s
    assert theta.grad.item() == pytest.approx(2 * (0.5 - 0.3 + 7 - 8), rel=1e-5)


def test_starting_step_is_at_most_the_step_that_reaches_the_largest_input():
    assert starting_step(torch.tensor([7.0, 7.0]), torch.tensor(1000.0), 4).item() == 2
    assert starting_step(torch.tensor([7.0, 7.0]), torch.tensor(7.5), 4).item() == 1


def test_starting_step_of_zero_inputs_is_the_smallest_scale_and_keeps_zeros():
    step = starting_step(torch.zeros(8), torch.zeros(()), 8)
    assert step.tolist() == [2.0**-17]
    assert quantize_per_tensor(torch.zeros(2, 8), torch.zeros(1), step, 8).tolist() == [[0.0] * 8] * 2
