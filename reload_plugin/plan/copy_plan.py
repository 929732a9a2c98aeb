"""What a loader did with each weight, as strided copies that can be done again without the loader.

Learnt while the model's own loader runs (on meta tensors in a plan, or on the weights themselves), and
valid for as long as names, shapes, dtypes and the placement of experts stay the same.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

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

    @functools.cached_property
    def contenders(self) -> frozenset[str]:
        """The weights that share a slot with another."""
        return frozenset(itertools.chain.from_iterable(self.contested.values()))

    @functools.cached_property
    def computed(self) -> int:
        """Weights that still need the model's loader."""
        return sum(tensor_plan.copies is None for tensor_plan in self.of.values())


def copy_by_plan(
    tensor_plan: TensorPlan, tensor: torch.Tensor, memory: Callable[[str], torch.UntypedStorage]
) -> None:
    """Do the copies of a tensor plan: write ``tensor`` to its parameters.

    Args:
        tensor_plan: one with copies, which fits the tensor.
        tensor: the weight, on any device and in any layout.
        memory: staging of a parameter, allocated.

    """
    assert tensor_plan.copies is not None, "computed weights go through the loader"
    if tensor_plan.plain is not None and _moved(tensor_plan.plain, tensor, memory):
        return
    source = tensor.detach()
    if any(copy.source is not None for copy in tensor_plan.copies) and not source.is_contiguous():
        source = source.contiguous()
    for copy in tensor_plan.copies:
        target = torch.empty(0, dtype=copy.target_dtype, device=memory(copy.parameter).device)
        view = target.set_(memory(copy.parameter), copy.target.offset, copy.target.size, copy.target.stride)
        if copy.source is None:
            view.fill_(copy.value)
        else:
            base = source if copy.source_dtype == source.dtype else source.view(copy.source_dtype)
            offset = base.storage_offset() + copy.source.offset
            copy_into(view, base.as_strided(copy.source.size, copy.source.stride, offset))


_DIRECT_BYTES = 1 << 20
"""Plain memory up to this size is moved by one core: for an expert's matrix, waking the others and
waiting for them costs more than the copy."""


def _moved(copy: StridedCopy, tensor: torch.Tensor, memory: Callable[[str], torch.UntypedStorage]) -> bool:
    """Whether a weight that goes as it is was moved to its place, bytes by bytes and without a tensor there.

    That takes a few microseconds less than a copy, and is nearly all that many small experts cost.
    """
    if type(tensor) not in _PLAIN_CLASSES or not tensor.is_cpu or not tensor.is_contiguous():
        return False
    nbytes, source = tensor.nbytes, tensor.data_ptr()
    if nbytes > _DIRECT_BYTES or not source or tensor.is_conj() or tensor.is_neg():
        return False
    target, start = memory(copy.parameter), copy.target.offset * copy.target_dtype.itemsize
    address = target.data_ptr()
    if target.device.type != "cpu" or not address or start + nbytes > target.nbytes():
        return False
    ctypes.memmove(address + start, source, nbytes)
    return True


_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)
"""Whose memory is theirs alone to explain."""


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)``, on this core where that is quicker."""
    plain = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    nbytes = target.numel() * target.element_size()
    on_cpu = target.device.type == "cpu" and source.device.type == "cpu"
    there = plain and on_cpu and target.data_ptr() and source.data_ptr()  # a storage may have been emptied
    if there and nbytes <= _DIRECT_BYTES and not source.is_conj() and not source.is_neg():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
    else:
        target.copy_(source)
