"""A device for tests where there is none: tensors that say that they are elsewhere.

What passes between them and the host is counted, and they refuse to be mixed with the host's
tensors, as a GPU's do. To torch they are on "meta", the one device that autograd knows in every
build; their numbers lie on the processor.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

FAR = torch.device("meta")
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class FarTensor(Tensor):
    """A tensor on the device, made of one on the host; `near` holds its numbers."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        made: FarTensor = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )
        made.near = near.detach()
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} outside of `traffic`.")


class Traffic(TorchDispatchMode):
    """Runs what happens on the device, and lists what passes between it and the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.to_host: list[str] = []
        self.to_device: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        far = any(isinstance(tensor, FarTensor) for tensor in tensors)
        target = kwargs.get("device")
        arrives = target is not None and torch.device(target).type == FAR.type
        if not far and not arrives:
            return func(*args, **kwargs)
        leaves = far and target is not None and not arrives
        if name == "copy_":
            leaves = not isinstance(args[0], FarTensor)
        if leaves or name in READS:
            self.to_host.append(name)
        # Numbers by themselves travel with the call.
        elif any(not isinstance(t, FarTensor) and (t.dim() > 0 or not far) for t in tensors):
            if far and name not in ("copy_", *INDEXING):
                raise RuntimeError(f"{name} wants all tensors on the same device.")
            self.to_device.append(name)
        near = {"device": torch.device("cpu")} if arrives else {}
        inner, options = tree_map_only(FarTensor, lambda t: t.near, (args, kwargs | near))
        found = func(*inner, **options)
        if leaves:
            return args[0] if name == "copy_" else found
        found = tree_map_only(Tensor, FarTensor, found)
        return return_and_correct_aliasing(func, args, kwargs, found) if far else found


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Runs the code inside with the device."""
    autocast, tensor = torch.autocast, torch.tensor

    def far_autocast(device_type: str, *arguments: Any, **options: Any) -> Any:
        known = device_type != FAR.type
        return autocast(device_type, *arguments, **options) if known else nullcontext()

    def far_tensor(data: Any, **options: Any) -> Tensor:
        # Torch leaves the numbers out on "meta".
        device = options.pop("device", None)
        return tensor(data, **options) if device is None else tensor(data, **options).to(device)

    with (
        mock.patch.object(torch, "autocast", far_autocast),
        mock.patch.object(torch, "tensor", far_tensor),
        Traffic() as seen,
    ):
        yield seen


def send(module: nn.Module) -> nn.Module:
    """Moves a module's parameters to the device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(FarTensor(parameter.detach().clone())))
    return module
