"""Simulates an accelerator on a machine without one, and counts transfers to and from it.

Its tensors refuse to be mixed with the host's, as a GPU's do. To torch they are on "meta", the one
device that autograd supports in every build; their values are kept on the processor.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class DeviceTensor(Tensor):
    """A tensor on the device; `host` holds its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way

    @staticmethod
    def __new__(cls, host: Tensor) -> "DeviceTensor":
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        made.host = host.detach()
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} outside of `traffic`.")


class Traffic(TorchDispatchMode):
    """Runs the device's operations on the host, and lists the transfers between the two."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.to_host: list[str] = []
        self.to_device: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        target = kwargs.get("device")
        arrives = target is not None and torch.device(target).type == DEVICE.type
        if not on_device and not arrives:
            return func(*args, **kwargs)
        leaves = on_device and target is not None and not arrives
        if name == "copy_":
            leaves = not isinstance(args[0], DeviceTensor)
        if leaves or name in READS:
            self.to_host.append(name)
        # A scalar is passed with the call and needs no transfer.
        elif any(
            not isinstance(t, DeviceTensor) and (t.dim() > 0 or not on_device) for t in tensors
        ):
            if on_device and name not in ("copy_", *INDEXING):
                raise RuntimeError(f"{name} wants all tensors on the same device.")
            self.to_device.append(name)
        on_host = {"device": torch.device("cpu")} if arrives else {}
        inner, options = tree_map_only(DeviceTensor, lambda t: t.host, (args, kwargs | on_host))
        found = func(*inner, **options)
        if leaves:
            return args[0] if name == "copy_" else found
        found = tree_map_only(Tensor, DeviceTensor, found)
        return return_and_correct_aliasing(func, args, kwargs, found) if on_device else found


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Makes the device available inside the block."""
    autocast, tensor = torch.autocast, torch.tensor

    def device_autocast(device_type: str, *arguments: Any, **options: Any) -> Any:
        known = device_type != DEVICE.type
        return autocast(device_type, *arguments, **options) if known else nullcontext()

    def device_tensor(data: Any, **options: Any) -> Tensor:
        # On "meta" torch would drop the values.
        device = options.pop("device", None)
        return tensor(data, **options) if device is None else tensor(data, **options).to(device)

    with (
        mock.patch.object(torch, "autocast", device_autocast),
        mock.patch.object(torch, "tensor", device_tensor),
        Traffic() as seen,
    ):
        yield seen


def send(module: nn.Module) -> nn.Module:
    """Moves a module's parameters to the device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(DeviceTensor(parameter.detach().clone())))
    return module
