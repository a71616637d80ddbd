"""Tensors that lie in a file while they are not used."""

import pytest
import torch
from torch import nn

from cbqstream.disk import Disk
from cbqstream.runtime.offload import Offloadable, OffloadedTensor


class Two(Offloadable):
    """A module with two large tensors and a small one."""

    large = ("weight", "v")

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.register_buffer("v", torch.zeros_like(weight, dtype=torch.float16))
        self.bias = nn.Parameter(torch.ones(weight.shape[0]))


@pytest.fixture
def file(tmp_path):
    with Disk().scratch(tmp_path / "layers") as opened:
        yield opened


@pytest.fixture
def two():
    return Two(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int64])
def test_pages_come_back_bit_for_bit(file, dtype):
    values = torch.arange(-6, 6).to(dtype)
    pages = [OffloadedTensor.of(values.view(3, 4), file), OffloadedTensor.of(values.view(3, 4).T, file)]
    assert torch.equal(pages[0].read(), values.view(3, 4))
    assert torch.equal(pages[1].read(), values.view(3, 4).T)
    assert pages[0].nbytes == values.nbytes


def test_what_is_not_placed_is_not_in_memory(file, two):
    weight = two.weight.clone()
    two.offload(file)
    assert (two.weight.device.type, two.v.device.type, two.bias.device.type) == ("meta", "meta", "cpu")
    assert (two.weight.shape, two.weight.dtype) == (weight.shape, weight.dtype)
    with two.placed():
        assert torch.equal(two.weight, weight)
        assert not two.v.any()
    assert two.weight.device.type == "meta"


def test_what_changes_while_it_is_placed_stays_changed_and_only_that_is_written(file, two, monkeypatch):
    two.offload(file)
    written = []
    real_write = OffloadedTensor.write
    monkeypatch.setattr(
        OffloadedTensor, "write", lambda page, tensor: (written.append(tensor.dtype), real_write(page, tensor))
    )
    with two.placed():
        two.v[1:3].add_(0.25)
    with two.placed():
        assert two.v.sum() == 0.25 * 12
    assert written == [torch.float16]


def test_placed_within_placed_is_one_tensor(file, two):
    two.offload(file)
    with two.placed():
        outer = two.weight
        with two.placed():
            two.weight.zero_()
        assert two.weight is outer
    with two.placed():
        assert not two.weight.any()


def test_an_error_leaves_nothing_in_memory_and_what_lay_there(file, two):
    weight = two.weight.clone()
    two.offload(file)

    def fail():
        with two.placed():
            two.weight.zero_()
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert two.weight.device.type == "meta"
    with two.placed():
        assert torch.equal(two.weight, weight)


def test_a_tensor_of_two_modules_lies_there_once(file, two):
    two.offload(file)
    with two.placed():
        other = Two(two.weight)
        other.offload_beside(two)
    assert other.page("weight") == two.page("weight")
    assert other.page("v") != two.page("v")
    in_memory = Two(torch.ones(2, 2))
    Two(in_memory.weight).offload_beside(in_memory)
    assert in_memory.page("weight") is None


def test_another_tensor_in_its_place(file, two):
    two.offload(file)
    two.put("weight", torch.ones(2, 2, dtype=torch.int8))
    assert (two.weight.device.type, two.weight.dtype) == ("meta", torch.int8)
    with two.placed():
        assert torch.equal(two.weight, torch.ones(2, 2, dtype=torch.int8))
