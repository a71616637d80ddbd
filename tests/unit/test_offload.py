"""Offloading of tensors to a scratch file while nothing is computed with them."""

import pytest
import torch
from torch import nn

from cbqstream.disk import Disk
from cbqstream.runtime.offload import Offloadable, OffloadedTensor


class TwoLargeTensors(Offloadable):
    """A module with two large tensors that are offloaded and a small one that is not."""

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
def module():
    return TwoLargeTensors(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int64])
def test_tensors_are_read_back_bit_for_bit(file, dtype):
    values = torch.arange(-6, 6).to(dtype)
    tensors = [OffloadedTensor.of(values.view(3, 4), file), OffloadedTensor.of(values.view(3, 4).T, file)]
    assert torch.equal(tensors[0].read(), values.view(3, 4))
    assert torch.equal(tensors[1].read(), values.view(3, 4).T)
    assert tensors[0].nbytes == values.nbytes


def test_large_tensors_are_on_the_meta_device_unless_placed(file, module):
    weight = module.weight.clone()
    module.offload(file)
    assert (module.weight.device.type, module.v.device.type, module.bias.device.type) == ("meta", "meta", "cpu")
    assert (module.weight.shape, module.weight.dtype) == (weight.shape, weight.dtype)
    with module.placed():
        assert torch.equal(module.weight, weight)
        assert not module.v.any()
    assert module.weight.device.type == "meta"


def test_only_tensors_that_change_while_placed_are_written_back(file, module, monkeypatch):
    module.offload(file)
    written = []
    real_write = OffloadedTensor.write
    monkeypatch.setattr(
        OffloadedTensor, "write", lambda stored, tensor: (written.append(tensor.dtype), real_write(stored, tensor))
    )
    with module.placed():
        module.v[1:3].add_(0.25)
    with module.placed():
        assert module.v.sum() == 0.25 * 12
    assert written == [torch.float16]


def test_nested_placing_gives_the_same_tensor(file, module):
    module.offload(file)
    with module.placed():
        outer = module.weight
        with module.placed():
            module.weight.zero_()
        assert module.weight is outer
    with module.placed():
        assert not module.weight.any()


def test_an_error_while_placed_frees_the_memory_and_keeps_the_stored_values(file, module):
    weight = module.weight.clone()
    module.offload(file)

    def fail():
        with module.placed():
            module.weight.zero_()
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert module.weight.device.type == "meta"
    with module.placed():
        assert torch.equal(module.weight, weight)


def test_a_tensor_that_two_modules_share_is_stored_once(file, module):
    module.offload(file)
    with module.placed():
        other = TwoLargeTensors(module.weight)
        other.offload_beside(module)
    assert other.offloaded("weight") == module.offloaded("weight")
    assert other.offloaded("v") != module.offloaded("v")
    in_memory = TwoLargeTensors(torch.ones(2, 2))
    TwoLargeTensors(in_memory.weight).offload_beside(in_memory)
    assert in_memory.offloaded("weight") is None


def test_put_replaces_an_offloaded_tensor(file, module):
    module.offload(file)
    module.put("weight", torch.ones(2, 2, dtype=torch.int8))
    assert (module.weight.device.type, module.weight.dtype) == ("meta", torch.int8)
    with module.placed():
        assert torch.equal(module.weight, torch.ones(2, 2, dtype=torch.int8))
