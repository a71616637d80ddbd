"""Modules without memory for their weights."""

import torch
from torch import nn

from cbqstream.models.empty_weights import empty_weights
from cbqstream.runtime.memory import peak_resident_bytes


class Block(nn.Module):
    """A parameter that is larger than the memory of most machines, a small one, and a buffer."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.empty(1 << 12, 1 << 12, 1 << 12))
        self.linear = nn.Linear(8, 4)
        self.register_buffer("frequencies", torch.arange(4.0))


def test_a_parameter_that_no_machine_can_allocate_takes_no_memory():
    before = peak_resident_bytes()
    with empty_weights():
        block = Block()
    assert peak_resident_bytes() - before < 1 << 27
    assert block.experts.is_meta
    assert block.experts.shape == (1 << 12, 1 << 12, 1 << 12)
    assert block.linear.weight.is_meta
    assert block.frequencies.tolist() == [0, 1, 2, 3]


def test_tensors_outside_are_as_always():
    with empty_weights():
        small = torch.empty(3, 5)
        large = torch.zeros(1 << 20)
    assert not small.is_meta
    assert not large.is_meta
    assert not torch.empty((1 << 10, 1 << 10)).is_meta
