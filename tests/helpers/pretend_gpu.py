"""A simulated GPU: tensors that report another device but lie in the memory of the host.

It fails where a real GPU fails: on operations on tensors of both devices, and on numpy with a tensor of the GPU. So code for
GPUs can be tested on machines without one, except for its speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("ipu:0")  # a device type that torch knows by name and does not initialize
_BOTH = ("aten.copy_", "aten._to_copy", "aten.index.Tensor", "aten.index_put", "aten._index_put_impl_")


class OnGpu(torch.Tensor):
    """A tensor on the simulated GPU. inner: its values, on the host."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=GPU
        )
        tensor.inner = inner.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operation}: outside of the pretence")

    # For these methods torch would call a driver before it dispatches. Single values may be read from the host.
    def __getitem__(self, index: Any) -> OnGpu:
        return OnGpu(self.inner[_to_host(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.inner[_to_host(index)] = _to_host(value)

    def contiguous(self) -> OnGpu:
        return OnGpu(self.inner.contiguous())

    def copy_(self, source: torch.Tensor) -> OnGpu:
        self.inner.copy_(_to_host(source))
        return self

    def __float__(self) -> float:
        return float(self.inner)

    def __int__(self) -> int:
        return int(self.inner)

    def __bool__(self) -> bool:
        return bool(self.inner)

    def item(self) -> Any:
        return self.inner.item()

    def tolist(self) -> Any:
        return self.inner.tolist()


def _to_host(values: Any) -> Any:
    """The values with all tensors and devices moved to the host."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.device) and value == GPU:
            return torch.device("cpu")
        return value.inner if isinstance(value, OnGpu) else value

    return tree_map(move, values)


class PretendGpu(TorchDispatchMode):
    """While this mode is entered, the simulated GPU exists. on_gpu: number of operations that ran on it."""

    on_gpu = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(operation), dict(kwargs or {})
        if name.startswith("aten._fused_sdp_choice"):
            return 0  # the plain implementation; the others are kernels of a real GPU
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, OnGpu)]
        theirs = [t for t in tensors if not isinstance(t, OnGpu) and t.ndim]
        assert not (ours and theirs) or name.startswith(_BOTH), f"{name} on tensors of two devices"
        device = next((d for d in tree_flatten((args, kwargs))[0] if isinstance(d, torch.device)), None)
        to_gpu = bool(ours) if device is None else device.type == GPU.type
        if name.startswith(_BOTH) and device is None and tensors:
            to_gpu = isinstance(tensors[0], OnGpu)
        self.on_gpu += to_gpu
        result = operation(*_to_host(args), **_to_host(kwargs))
        if operation._schema.is_mutable and tensors and isinstance(result, torch.Tensor):
            return tensors[0]
        return tree_map(lambda t: OnGpu(t) if isinstance(t, torch.Tensor) else t, result) if to_gpu else result
