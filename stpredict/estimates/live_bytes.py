"""Bytes of the tensors that are alive, operator by operator: of real tensors and of those that have shapes alone."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, every storage that an operator makes counts until nobody holds it any more. ``bytes`` is
    what is alive now, ``peak`` the most so far; ``after`` is called behind every operator that makes tensors.

    It sees what operators return, not what their kernels need meanwhile. On CUDA the engine's own tensors are made by
    operators as well; those of NCCL are not.
    """

    def __init__(self, after: Callable[[], None] = lambda: None):
        super().__init__()
        self.bytes = self.peak = 0
        self.after = after
        self._storages: dict[int, tuple[weakref.ref, int | None]] = {}  # by address: size, or None if it is ignored

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """These count nothing, though operators make views of them."""
        for tensor in tensors:
            self._enter(tensor.untyped_storage(), None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = False
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
                found = True
        if found:
            self.peak = max(self.peak, self.bytes)
            self.after()
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        reference, before = self._storages.get(storage._cdata, (None, 0))
        if reference is None or reference() is not storage:
            before = 0
        if before is not None:
            size = storage.nbytes()  # a storage may be resized
            if reference is None or size != before:
                self._enter(storage, size)
            self.bytes += size - before

    def _enter(self, storage: torch.UntypedStorage, size: int | None) -> None:
        address = storage._cdata
        self._storages[address] = weakref.ref(storage, lambda gone: self._gone(address, gone)), size

    def _gone(self, address: int, reference: weakref.ref) -> None:
        if address in self._storages and self._storages[address][0] is reference:
            self.bytes -= self._storages.pop(address)[1] or 0
