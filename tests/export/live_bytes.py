"""Counts the bytes of tensors that are made while a block runs, and how many of them lived at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """While entered, every new storage is counted until the last tensor on it is freed.

    Tensors on storages that were there before (the model's own) and meta tensors do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._tensors: dict[int, int] = {}
        """Address of a counted storage -> tensors on it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        given = {t.untyped_storage()._cdata for t in leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._count(tensor, given)
        return result

    def _count(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in given and key not in self._tensors:
            return
        if key not in self._tensors:
            self.now += nbytes
            self.peak = max(self.peak, self.now)
        self._tensors[key] = self._tensors.get(key, 0) + 1
        weakref.finalize(tensor, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.now -= nbytes
