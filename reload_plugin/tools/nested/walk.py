"""One pass over a nested state dict: its tree, and the tensors in it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .form import SCALARS, scalar

Path = tuple[Any, ...]


@dataclass(frozen=True)
class NotMade:
    """Stands in a nested state dict for an object that nobody made; ``kind`` is the name of its class."""

    kind: str


@dataclass(eq=False)
class Leaf:
    """A tensor as it was met, and its place in the tree, filled in when all tensors are known."""

    path: Path
    tensor: torch.Tensor
    node: dict[str, Any]

    @property
    def span(self) -> tuple[int, int]:
        """First byte and the byte after the last, counted in the storage."""
        tensor, size = self.tensor, self.tensor.element_size()
        start = int(tensor.storage_offset()) * size
        if not tensor.numel():
            return start, start
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return start, start + (last + 1) * size


class Walk:
    """One pass over a nested state dict."""

    def __init__(self, outline: bool) -> None:
        self.refused: list[str] = []
        self._outline = outline
        self.leaves: list[Leaf] = []
        self._open: set[int] = set()

    def node(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if kind in (dict, OrderedDict, list, tuple):
            return self._container(value, path)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind in SCALARS:
            return scalar(value)
        return self._refuse(path, f"is {_indefinite(value)}")

    def _container(self, value: Any, path: Path) -> Any:
        if id(value) in self._open:
            return self._refuse(path, "holds itself")
        self._open.add(id(value))
        try:
            if type(value) is list:
                return [self.node(item, (*path, i)) for i, item in enumerate(value)]
            if type(value) is tuple:
                return {"tuple": [self.node(item, (*path, i)) for i, item in enumerate(value)]}
            entries = [
                [self._key(key, path), self.node(item, (*path, key))]
                for key, item in type(value).items(value)
            ]
            if type(value) is dict:
                return {"dict": entries}
            return {"ordered": entries} | self._attributes(value, path)
        finally:
            self._open.discard(id(value))

    def _key(self, key: Any, path: Path) -> Any:
        if type(key) in SCALARS:
            return scalar(key)
        if type(key) is tuple:
            return {"tuple": [self._key(part, path) for part in key]}
        return self._refuse(path, f"has a key that is {_indefinite(key)}")

    def _attributes(self, value: OrderedDict[Any, Any], path: Path) -> dict[str, Any]:
        """``state_dict()`` hangs the versions of its modules on its result."""
        found = vars(value)
        for name in found.keys() - {"_metadata"}:
            self._refuse(path, f"has the attribute {name!r}")
        return (
            {"_metadata": self.node(found["_metadata"], (*path, "_metadata"))} if "_metadata" in found else {}
        )

    def _tensor(self, value: torch.Tensor, path: Path) -> Any:
        if type(value) not in (torch.Tensor, nn.Parameter):
            return self._refuse(path, f"is {_indefinite(value)}")
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            return self._refuse(path, f"is a tensor of the layout {value.layout}")
        if value.is_meta and not self._outline:
            return self._refuse(path, "is a meta tensor, without values")
        node: dict[str, Any] = {"tensor": None}
        if type(value) is nn.Parameter:
            node["parameter"] = True
        if value.requires_grad:
            node["requires_grad"] = True
        self.leaves.append(Leaf(path, value.detach(), node))
        return node

    def _refuse(self, path: Path, reason: str) -> None:
        self.refused.append(f"{_spelled(path)} {reason}")


def _spelled(path: Path) -> str:
    return "the state dict itself" if not path else "".join(f"[{part!r}]" for part in path)


def _indefinite(value: Any) -> str:
    if isinstance(value, NotMade):
        return f"of the type {value.kind}"
    kind = type(value)
    name = (
        kind.__qualname__
        if kind.__module__ in ("builtins", "__main__")
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    return f"of the type {name}"
