"""The simulated device refuses and counts as expected, so that the tests relying on it prove something."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from reference.simulated_cuda import CudaTensor, Device, simulated_cuda


@pytest.fixture
def device() -> Iterator[Device]:
    with simulated_cuda() as device:
        yield device


def test_tensors_and_modules_move_to_the_device_and_back(device: Device) -> None:
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([0.0, 0.0], device="cuda:0"),
        torch.ones(2).cuda() * 0.0,
        torch.ones(2).to("cuda", torch.float32).new_zeros(2),
    ]
    for tensor in made:
        assert isinstance(tensor, CudaTensor)
        assert (tensor.device.type, tensor.is_cuda) == ("cuda", True)
        assert type(tensor.cpu()) is Tensor
        assert tensor.tolist() == [0.0, 0.0]
    layer = nn.Linear(2, 2).to(device="cuda", dtype=torch.bfloat16)
    assert isinstance(layer.weight, nn.Parameter)
    assert (layer.weight.device.type, layer.weight.dtype) == ("cuda", torch.bfloat16)


def test_writing_through_a_view_and_taking_gradients_work_as_on_any_device(device: Device) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    row = x[1]
    assert row.add_(1.0) is row
    assert x.tolist() == [[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]]
    x.requires_grad_()
    (x[0] * x[1]).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[4.0, 5.0, 6.0], [0.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: x[torch.tensor([0])],
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.index_copy_(0, torch.tensor([0]), x[:1]),
        lambda x: torch.ones(3)[x.long()],
        lambda x: x @ torch.ones(3),
        lambda x: torch.gather(x, 0, torch.zeros(3, dtype=torch.long)),
        lambda x: torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), x[:, None]),
    ],
)
def test_operands_on_two_devices_are_refused(device: Device, mix: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, device="cuda"))


def test_host_scalars_are_operands_as_in_cuda(device: Device) -> None:
    x = torch.ones(3, device="cuda")
    x[1] = 2.0
    found = torch.where(x > 1, x * torch.tensor(3.0), 0.0) + 1
    assert found.tolist() == [1.0, 7.0, 1.0]


def test_cpu_only_operations_are_refused(device: Device) -> None:
    x = torch.ones(1, 1, 4, 8, device="cuda")
    with pytest.raises(TypeError, match="cpu\\(\\)"):
        x.numpy()
    with pytest.raises(NotImplementedError, match="CUDA"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)
    for place, generator in (("cuda", torch.Generator()), ("cpu", torch.Generator("cuda"))):
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=place, generator=generator)


@pytest.mark.parametrize(
    ("look", "operation"),
    [
        (lambda x: int(x[0]), "_local_scalar_dense"),
        (lambda x: x.tolist(), "_to_copy"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.empty(3).copy_(x), "copy_"),
    ],
)
def test_host_waits_are_counted(device: Device, look: Callable[[Tensor], object], operation: str) -> None:
    x = torch.ones(3, device="cuda")
    x[x.long()] = x * 2 + x.sum()
    assert not device.syncs
    look(x)
    assert dict(device.syncs) == {operation: 1}


def test_a_graph_replays_on_the_captured_tensors(device: Device) -> None:
    x, total = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = x * 2
        total[:1].add_((doubled + 1)[1:])
    assert total.tolist() == [0.0, 0.0]
    graph.replay()
    x.fill_(5.0)
    graph.replay()
    assert (doubled.tolist(), total.tolist()) == ([10.0, 10.0], [14.0, 0.0])


@pytest.mark.parametrize(
    "act",
    [
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1], device="cuda"),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x.cpu(),
    ],
)
def test_a_graph_refuses_host_copies_and_waits(device: Device, act: Callable[[Tensor], object]) -> None:
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        act(x)


def test_all_patches_are_undone() -> None:
    had_cuda = torch.cuda.is_available()
    with simulated_cuda():
        x = torch.ones(1, device="cuda")
    assert torch.cuda.is_available() == had_cuda
    assert torch.Generator.__module__ == "torch._C"
    assert torch.tensor(1).to("cpu").device.type == "cpu"
    with pytest.raises(AssertionError, match="outside"):
        x + 1
