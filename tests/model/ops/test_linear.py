from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timeviper_model.ops.linear import MIN_PRODUCTS, Linear, pack_linears

ENOUGH = MIN_PRODUCTS // (64 * 48)


class OneDnnProducts(TorchDispatchMode):
    """Records every product that oneDNN computes: its rows, and whether the weight was packed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.found.append((len(args[0]), args[1].is_mkldnn))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def products() -> Iterator[list[tuple[int, bool]]]:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    with OneDnnProducts() as products:
        yield products.found


def make(num_rows: int, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[Linear, torch.Tensor]:
    torch.manual_seed(0)
    return Linear(64, 48, bias=bias, dtype=dtype), torch.randn(num_rows, 64, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_onednn_gives_the_same_product(bias: bool, products: list[tuple[int, bool]]) -> None:
    linear, x = make(ENOUGH + 1, bias=bias)
    with torch.inference_mode():
        y, y3 = linear(x), linear(x[None])[0]
    assert products == [(ENOUGH + 1, False), (1, False)]
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y3, y)


def test_gradients_other_dtypes_and_few_rows_are_left_to_pytorch(products: list[tuple[int, bool]]) -> None:
    linear, x = make(ENOUGH + 1)
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(48, -1), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        linear(x[: ENOUGH // 2])
        for dtype in (torch.float64, torch.bfloat16):
            other, wide = make(ENOUGH + 1, dtype)
            other(wide)
    assert products == []


def test_without_onednn_the_product_is_the_same(products: list[tuple[int, bool]]) -> None:
    linear, x = make(ENOUGH + 1)
    with torch.inference_mode():
        expected = linear(x)
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    assert len(products) == 1


def test_a_packed_weight_gives_the_same_product_until_it_changes(products: list[tuple[int, bool]]) -> None:
    linear, x = make(ENOUGH + 1)
    model = torch.nn.Sequential(linear)
    with torch.inference_mode():
        expected = model(x)
        pack_linears(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        linear.weight.mul_(2.0)
        torch.testing.assert_close(model(x) - linear.bias, 2 * (expected - linear.bias), rtol=1e-5, atol=1e-5)
        pack_linears(model)
        model(x)
        linear.weight = torch.nn.Parameter(torch.zeros_like(linear.weight))
        torch.testing.assert_close(model(x), linear.bias.expand(len(x), -1))
    assert [packed for _, packed in products] == [False, True, False, True, False]
    model(x).sum().backward()
    assert linear.weight.grad is not None


def test_copies_of_a_packed_model_are_unpacked(products: list[tuple[int, bool]]) -> None:
    linear, x = make(ENOUGH + 1)
    names = list(linear.state_dict())
    pack_linears(linear)
    assert list(linear.state_dict()) == names
    with torch.inference_mode():
        for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            torch.testing.assert_close(other(x), linear(x), rtol=1e-5, atol=1e-5)
    assert [packed for _, packed in products] == [False, True] * 2


def test_packing_changes_nothing_for_another_dtype(products: list[tuple[int, bool]]) -> None:
    half, x = make(ENOUGH + 1, torch.bfloat16)
    with torch.inference_mode():
        expected = half(x)
        pack_linears(half)
        assert torch.equal(half(x), expected)
    assert products == []
