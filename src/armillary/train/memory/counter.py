"""Bytes that tensors hold, every storage counted once: what autograd saves, what is alive, and the most that ever was."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

StorageWeakRef: Any = reductions.StorageWeakRef  # has no annotations


class SavedTensors:
    """Within `with`, counts what autograd keeps for backward. Storages of `excluded` tensors (parameters) are not counted.

    What selective checkpointing caches is kept beside autograd: `Alive` sees that.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self._excluded = {_key(tensor) for tensor in excluded}
        self._seen: dict[int, tuple[Any, int]] = {}
        self._hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._hooks.__exit__(*failure)

    @property
    def bytes(self) -> int:
        """Held at this moment."""
        return sum(size for reference, size in self._seen.values() if not reference.expired())

    def _pack(self, tensor: Tensor) -> Tensor:
        if (key := _key(tensor)) not in self._excluded:
            storage = tensor.untyped_storage()
            self._seen[key] = StorageWeakRef(storage), storage.nbytes()
        return tensor


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within `with`, follows every storage that an operation makes, and those of `tensors`; fake tensors count as real ones would.

    bytes: alive now. peak: the most after any operation, to within 0.2 % (looking after every one would be slow).
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, tuple[Any, int]] = {}
        self._bound = 0
        for tensor in tensors:
            self._follow(tensor)
        self.peak = self._bound = self.bytes

    @property
    def bytes(self) -> int:
        for key in [key for key, (reference, _) in self._seen.items() if reference.expired()]:
            del self._seen[key]
        self._bound = sum(size for _, size in self._seen.values())
        return self._bound

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._follow(value)
        if self._bound > 1.002 * self.peak:
            self.peak = max(self.peak, self.bytes)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        known = self._seen.get(key)
        if known is None or known[0].expired():
            self._seen[key] = StorageWeakRef(storage), storage.nbytes()
            self._bound += storage.nbytes()  # what has died meanwhile is still in it: never less than what is alive


def _key(tensor: Tensor) -> int:
    """The storage's address: views share it. One that died and one that took its place do too, which the weak reference tells."""
    return int(tensor.untyped_storage()._cdata)
