"""A simulated CUDA device in CPU memory that refuses what a GPU would refuse.

    with simulated_cuda() as device:          # "cuda", is_available, streams and graphs included
        model.to("cuda"); model(batch.to("cuda"))

Tensors on "cuda" are `CudaTensor`s: they report cuda:0 and hold an ordinary tensor. Errors name the operation: operands
on two devices, generators of the other device, CPU-only kernels, `.numpy()`; inside a captured graph also waiting and
copies from the host. `device.syncs` counts by name what makes the host wait.

CUDA's own limits of dtype, alignment and memory are not simulated. To C++ such a tensor is on `meta:1`, which every
build of torch can guard and differentiate.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
ALIAS = torch.device("meta", 1)
"""The device seen by C++."""
CAPABILITY = (9, 0)
MEMORY_BYTES = 1 << 36

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "is_nonzero",
    "repeat_interleave",
}  # fmt: skip
"""Operations whose result's value or size the host must know."""
TAKES_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""A mask among the indices makes the host wait. CUDA would fetch an index from the CPU; refused here."""
COPIES = {"copy_", "_to_copy"}
TAKES_HOST_SCALAR = {"fill_", "fill", "masked_fill", "masked_fill_", "where", *TAKES_INDEX}
"""Besides pointwise operations."""


class CudaTensor(Tensor):
    """A tensor that reports cuda:0."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[no-any-return,attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=ALIAS,
        )

    def __init__(self, held: Tensor) -> None:
        assert type(held) is Tensor, type(held)
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None  # Module.to replaces parameters by such tensors

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> CudaTensor:
        return CudaTensor(inner["held"])

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: object) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self, **_: object) -> str:
        return f"CudaTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside simulated_cuda()")


class Graph:
    """A stand-in for torch.cuda.CUDAGraph that repeats the captured operations on the same tensors."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], object]] = []

    def replay(self) -> None:
        for operation in self.operations:
            operation()


class Device(TorchDispatchMode):
    """Runs operations on the tensors held by CudaTensors, after checking their devices."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        """How often the host has waited, by operation."""
        self.graph: Graph | None = None
        """Captures operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # not decomposed in inference mode
                return func.decompose(*args, **kwargs)
        call = _Call(func, args, kwargs)
        call.check_generator()
        if call.on_device:
            call.check_devices()
        if call.waits:
            self.syncs[call.name] += 1
        if self.graph is not None and (call.waits or call.copies_from_host):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({func})")
        if self.graph is not None and call.result_on_device:
            return call.capture(self.graph)
        return call.give(call.run())

    @contextlib.contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        """torch.cuda.graph: operations in the block are captured instead of run."""
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None


class _Call:
    """An operation and its operands."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = func._schema.name.split("::")[1]
        self.operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.on_device = any(isinstance(operand, CudaTensor) for operand in self.operands)
        self.result_on_device = self.on_device
        if self.name == "copy_":
            self.result_on_device = isinstance(args[0], CudaTensor)
        elif kwargs.get("device") is not None:
            self.result_on_device = _alias(kwargs["device"]) == ALIAS
            if self.result_on_device:
                self.kwargs = kwargs | {"device": torch.device("cpu")}
        self.written = [
            args[index] if index < len(args) else kwargs[argument.name]
            for index, argument in enumerate(func._schema.arguments)
            if argument.is_write
        ]

    def check_generator(self) -> None:
        generator = self.kwargs.get("generator")
        if generator is not None and (generator._cdata in Generator.of_cuda) != self.result_on_device:
            raise RuntimeError(f"Expected a generator of the tensor's device: {self.func}")

    def check_devices(self) -> None:
        """Raises as CUDA does for operands on two devices, and for missing kernels."""
        if self.name.endswith("_for_cpu") or self.func.namespace in ("mkldnn", "quantized"):
            raise NotImplementedError(f"Could not run '{self.func}' with arguments from the 'CUDA' backend.")
        if self.name in COPIES:
            if not self.result_on_device and (self.kwargs.get("non_blocking") or self.args[2:] == (True,)):
                raise RuntimeError(f"{self.func} to the host with non_blocking=True: the copy may not be complete yet")
            return
        takes_host_scalar = torch.Tag.pointwise in self.func.tags or self.name in TAKES_HOST_SCALAR
        for operand in self.operands:
            is_fine = takes_host_scalar and operand.dim() == 0 and all(operand is not other for other in self.written)
            if not isinstance(operand, CudaTensor) and not is_fine:
                shapes = ", ".join(f"{each.device} {tuple(each.shape)}" for each in self.operands)
                raise RuntimeError(f"Expected all tensors to be on the same device: {self.func} of {shapes}")

    @property
    def waits(self) -> bool:
        if not self.on_device:
            return False
        is_mask = self.name in TAKES_INDEX and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in self.args[1]
        )
        return self.name in WAITING or is_mask or (self.name in COPIES and not self.result_on_device)

    @property
    def copies_from_host(self) -> bool:
        """True for a copy of pageable memory to the device, for which the host waits too."""
        source = self.args[1] if self.name == "copy_" else self.args[0] if self.args else None
        return self.name in COPIES and self.result_on_device and not isinstance(source, CudaTensor)

    def run(self) -> Any:
        return self.func(*tree_map(_held, self.args), **tree_map(_held, self.kwargs))

    def give(self, found: Any) -> Any:
        """The result as seen by the caller: the tensors written to, or new ones."""
        if self.written and self.func._schema.returns:
            assert all(tensor.shape == _held(tensor).shape for tensor in self.written), f"{self.func} changed a shape"
            return self.written[0] if len(self.func._schema.returns) == 1 else tuple(self.written)
        if not self.result_on_device:
            return found
        # a view of an ordinary tensor is an ordinary tensor, in inference mode too
        is_ordinary_view = self.func.is_view and not self.operands[0].is_inference()
        with torch.inference_mode(False) if is_ordinary_view else contextlib.nullcontext():
            return tree_map(_on_device, found)

    def capture(self, graph: Graph) -> Any:
        """Records the operation; a result that is not a view keeps its memory."""
        if self.written:
            graph.operations.append(self.run)
            return self.give(None)
        found = self.run()
        if not self.func.is_view:
            targets = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
            graph.operations.append(
                lambda: [
                    target.copy_(leaf)
                    for target, leaf in zip(
                        targets, (leaf for leaf in tree_leaves(self.run()) if isinstance(leaf, Tensor)), strict=True
                    )
                ]
            )
        return self.give(found)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, CudaTensor) else leaf


def _on_device(leaf: Any) -> Any:
    return CudaTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, CudaTensor) else leaf


class Generator(torch.Generator):
    """A generator that remembers its device."""

    of_cuda: ClassVar[set[int]] = set()
    """Addresses: an operation receives another Python object."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        self: Generator = super().__new__(cls)
        is_on_cuda = torch.device(device).type == "cuda"
        (cls.of_cuda.add if is_on_cuda else cls.of_cuda.discard)(self._cdata)
        return self


def _alias(device: Any) -> Any:
    """ALIAS for CUDA, anything else unchanged."""
    is_cuda = isinstance(device, str | torch.device) and torch.device(device).type == "cuda"
    return ALIAS if is_cuda else device


def _moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and similar, which have no operation of their own: created on the CPU, then copied."""

    def moved(*args: Any, device: Any = None, **options: Any) -> Tensor:
        if _alias(device) is device:
            return make(*args, device=device, **options)
        return make(*args, device="cpu", **options).to(_alias(device))

    return moved


def _new_bias(cls: type[CausalBias], *_: object) -> CausalBias:
    """A mode would create a plain Tensor instead of a CausalBias."""
    with _disable_current_modes():
        return Tensor.__new__(cls)


@contextlib.contextmanager
def simulated_cuda() -> Iterator[Device]:
    device = Device()
    _device_constructors()  # caches the real torch.tensor for `with torch.device(...)`
    patches = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "get_device_name": lambda device=None: "simulated CUDA",
        "get_device_capability": lambda device=None: CAPABILITY,
        "Stream": mock.MagicMock,
        "current_stream": mock.MagicMock,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": device.capture,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(CausalBias, "__new__", _new_bias))
        for make in ("tensor", "as_tensor", "asarray"):
            stack.enter_context(mock.patch.object(torch, make, _moved(getattr(torch, make))))
        to = Tensor.to
        stack.enter_context(
            mock.patch.object(
                Tensor,
                "to",
                lambda self, *args, **options: to(
                    self, *map(_alias, args), **{name: _alias(value) for name, value in options.items()}
                ),
            )
        )
        stack.enter_context(mock.patch.object(Tensor, "cuda", lambda self, *_, **options: to(self, ALIAS, **options)))
        stack.enter_context(device)
        yield device
