"""What a loader did with each weight, as strided copies that can be done again without the loader.

Learnt while the model's own loader runs (on meta tensors in a plan, or on the weights themselves), and
valid for as long as names, shapes, dtypes and the placement of experts stay the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..device.uploads import Copies
from ..record.tensor_layout import Geometry


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """One write into staging: a copy of a view of the weight, or a constant.

    Geometries are in elements of the dtype they stand beside; ``source`` is relative to the weight
    laid out contiguously, ``target`` to the storage of the parameter.
    """

    parameter: str
    target: Geometry
    target_dtype: torch.dtype
    source: Geometry | None
    source_dtype: torch.dtype
    value: float | int | bool | complex = 0


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Where one weight goes. ``copies`` is None where the loader computes; empty where it ignores."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    copies: tuple[StridedCopy, ...] | None
    _plain: Any = field(default=..., init=False, repr=False, compare=False)
    """What ``plain`` found; an ellipsis before it was asked."""

    @property
    def plain(self) -> StridedCopy | None:
        """The one write, if all of the weight goes as it is into contiguous elements."""
        if self._plain is ...:
            object.__setattr__(self, "_plain", self._find_plain())
        found: StridedCopy | None = self._plain
        return found

    def _find_plain(self) -> StridedCopy | None:
        if self.copies is None or len(self.copies) != 1:
            return None
        copy = self.copies[0]
        same = copy.source_dtype == copy.target_dtype == self.dtype
        whole = copy.source == Geometry.contiguous(self.shape)
        there = copy.target == Geometry.contiguous(copy.target.size, copy.target.offset)
        return copy if same and whole and there and copy.target.size == self.shape else None

    def fits(self, tensor: torch.Tensor) -> bool:
        return tensor.shape == self.shape and tensor.dtype == self.dtype


Slot = tuple[str, Geometry]
"""A parameter, and the elements of it that are written."""


@dataclass(frozen=True)
class CopyPlan:
    """How to load a whole checkpoint into one model: a tensor plan for each weight."""

    key: object
    """What the tensor plans depend on beside the weights themselves (placement of experts)."""
    of: Mapping[str, TensorPlan]
    contested: Mapping[Slot, Collection[str]] = field(default_factory=dict)
    """Slots that several weights are written to -> those weights: fused layers share one input scale."""
    needed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What ``source_ranges.needed_of`` found, by weight, for the next reload."""

    @functools.cached_property
    def contenders(self) -> frozenset[str]:
        """The weights that share a slot with another."""
        return frozenset(itertools.chain.from_iterable(self.contested.values()))

    @functools.cached_property
    def computed(self) -> int:
        """Weights that still need the model's loader."""
        return sum(tensor_plan.copies is None for tensor_plan in self.of.values())


def copy_by_plan(
    tensor_plan: TensorPlan,
    tensor: torch.Tensor,
    memory: Callable[[str], torch.UntypedStorage],
    copier: Copies,
) -> None:
    """Do the copies of a tensor plan: write ``tensor`` to its parameters.

    Args:
        tensor_plan: one with copies, which fits the tensor.
        tensor: the weight, on any device and in any layout.
        memory: staging of a parameter, allocated.
        copier: copies to the device that staging is on.

    """
    assert tensor_plan.copies is not None, "computed weights go through the loader"
    plain = tensor_plan.plain
    if plain is not None:
        start = plain.target.offset * plain.target_dtype.itemsize
        if copier.copy_bytes(memory(plain.parameter), start, tensor):
            return
    source = tensor.detach()
    if any(copy.source is not None for copy in tensor_plan.copies) and not source.is_contiguous():
        source = source.contiguous()
    for copy in tensor_plan.copies:
        storage = memory(copy.parameter)
        empty = torch.empty(0, dtype=copy.target_dtype, device=storage.device)
        view = empty.set_(storage, copy.target.offset, copy.target.size, copy.target.stride)
        if copy.source is None:
            view.fill_(copy.value)
        else:
            base = source if copy.source_dtype == source.dtype else source.view(copy.source_dtype)
            offset = base.storage_offset() + copy.source.offset
            copier.copy(view, base.as_strided(copy.source.size, copy.source.stride, offset))
