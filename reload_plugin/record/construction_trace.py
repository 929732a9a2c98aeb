"""What a model's constructor puts into each storage, watched while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tensors import storage_id
from .tensor_layout import (
    AsServed,
    Constant,
    Initial,
    Uninitialised,
)


class ConstructionTrace(TorchDispatchMode):
    """Notes what the constructor puts into each storage: nothing, one value, or computed values."""

    _EMPTY = ("empty", "new_empty")
    _COPIES = frozenset({"_to_copy", "clone", "_pin_memory", "get_cuda_view_from_cpu_tensor"})
    """The last two are of vLLM's offloader: pinned memory, and a view of it for the device."""
    _FILLS: Mapping[str, float] = {"zeros": 0, "new_zeros": 0, "ones": 1, "new_ones": 1}

    def __init__(self) -> None:
        super().__init__()
        self.initial: dict[int, Initial] = {}
        self._noted: list[StorageWeakRef] = []
        """Weak references keep the identity of a freed storage reserved. Without them a new storage could get
        that identity and, if no mode saw it being made (``torch.tensor(1.0)``), the initial values noted for
        it.
        """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.endswith("_") and not name.startswith("_") and args and isinstance(args[0], torch.Tensor):
            self._note_written(name, args)
        else:
            inputs = {storage_id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and (key := storage_id(tensor)) not in inputs and key:
                    self.initial[key] = self._made_by(name, args)
                    self._noted.append(StorageWeakRef(tensor.untyped_storage()))
        return out

    def _made_by(self, name: str, args: tuple[Any, ...]) -> Initial:
        base = name.removesuffix("_like")
        if base.startswith(self._EMPTY):
            return Uninitialised()
        if base in self._FILLS:
            return Constant(self._FILLS[base])
        if base in ("full", "new_full") and isinstance(args[-1], (int, float, bool, complex)):
            return Constant(args[-1])
        if name.rpartition("::")[2] in self._COPIES and isinstance(args[0], torch.Tensor):
            return self.initial.get(storage_id(args[0]) or 0, AsServed())
        return AsServed()

    def _note_written(self, name: str, args: tuple[Any, ...]) -> None:
        target = args[0]
        key = storage_id(target)
        if key is None:
            return
        whole = target.numel() * target.element_size() >= target.untyped_storage().nbytes()
        if whole and name == "zero_":
            self.initial[key] = Constant(0)
        elif whole and name == "fill_" and isinstance(args[1], (int, float, bool, complex)):
            self.initial[key] = Constant(args[1])
        else:
            self.initial[key] = AsServed()
