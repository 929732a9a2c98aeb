"""Rebuilds a nested state dict from its flat table and its structure."""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...checkpoint.dtypes import TORCH_DTYPES
from ...errors import ReloadError, SourceError
from .form import FORMAT, TAGS, Structure

ALIGNMENT = 16
"""Bytes of the largest element."""


def unflatten(flat: Mapping[str, torch.Tensor], structure: Structure) -> Any:
    """The nested state dict that ``flatten`` took apart: same types, keys, order and sharing of memory.

    Args:
        flat: tensors by name; the result shares their memory.
        structure: what ``flatten`` returned beside them, also after a way through JSON.

    Raises:
        SourceError: a tensor is missing or too small, or the structure is something else.

    """
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        raise SourceError(f"This is no structure of a nested state dict ({FORMAT}). Flatten it again.")
    try:
        return _Builder(flat).build(structure["tree"])
    except ReloadError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(
            f"The structure of a nested state dict is damaged: {reason}. Flatten it again."
        ) from error


class _Builder:
    """One tree being turned back; nodes alike give one and the same tensor object."""

    def __init__(self, flat: Mapping[str, torch.Tensor]) -> None:
        self._flat = flat
        self._made: dict[str, torch.Tensor] = {}
        self._bytes: dict[str, torch.Tensor] = {}

    def build(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.build(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            return self._tensor(node)
        if "dict" in node:
            return {self._key(key): self.build(item) for key, item in node["dict"]}
        if "ordered" in node:
            return self._ordered(node)
        if "tuple" in node:
            return tuple(self.build(item) for item in node["tuple"])
        return self._number(node)

    def _key(self, node: Any) -> Any:
        return self.build(node)

    def _number(self, node: dict[str, Any]) -> Any:
        ((tag, value),) = node.items()
        if tag == "complex":
            return complex(*(self.build(part) for part in value))
        return TAGS[tag](value)

    def _ordered(self, node: dict[str, Any]) -> OrderedDict[Any, Any]:
        made = OrderedDict((self._key(key), self.build(item)) for key, item in node["ordered"])
        if "_metadata" in node:
            vars(made)["_metadata"] = self.build(node["_metadata"])
        return made

    def _tensor(self, node: dict[str, Any]) -> torch.Tensor:
        key = repr(sorted(node.items()))
        if key not in self._made:
            self._made[key] = self._new(node)
        return self._made[key]

    def _new(self, node: dict[str, Any]) -> torch.Tensor:
        name = node["tensor"]
        if name not in self._flat:
            raise SourceError(
                f"{name} is missing beside the structure. Give all tensors that flatten returned."
            )
        seen = _seen(self._aligned(name), node["view"]) if "view" in node else self._flat[name]
        grad = bool(node.get("requires_grad"))
        if node.get("parameter"):
            return nn.Parameter(seen, requires_grad=grad)
        return seen.detach().requires_grad_() if grad else seen

    def _aligned(self, name: str) -> torch.Tensor:
        """Bytes that any dtype may be seen in; kernels for complex numbers crash on others."""
        if name not in self._bytes:
            tensor = self._flat[name]
            self._bytes[name] = tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
        return self._bytes[name]


def _seen(tensor: torch.Tensor, view: Mapping[str, Any]) -> torch.Tensor:
    """A view of the stored bytes of ``tensor``."""
    dtype = TORCH_DTYPES.get(view["dtype"])
    if dtype is None:
        raise TypeError(f"{view['dtype']} is no dtype")
    if not tensor.is_contiguous():
        raise ValueError("a stored tensor is not contiguous any more")
    start = tensor.storage_offset() * tensor.element_size() + view["offset"]
    shape, stride = _naturals(view["shape"]), _naturals(view["stride"])
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else -1
    if (
        view["offset"] < 0
        or view["offset"] + (last + 1) * dtype.itemsize > tensor.nbytes
        or start % dtype.itemsize
    ):
        raise ValueError("a view reaches beyond the tensor that holds it")
    empty = torch.empty(0, dtype=dtype, device=tensor.device)
    made = empty.set_(tensor.untyped_storage(), start // dtype.itemsize, shape, stride)
    made = made.conj() if view.get("conj") else made
    return torch._neg_view(made) if view.get("neg") else made


def _naturals(found: Sequence[Any]) -> list[int]:
    if not all(type(number) is int and number >= 0 for number in found):
        raise ValueError("sizes and strides have to be natural numbers")
    return list(found)
