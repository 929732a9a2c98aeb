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

from ..record.formats import Geometry


@dataclass(frozen=True, slots=True)
class Write:
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
class Route:
    """Where one weight goes. ``writes`` is None where the loader computes; empty where it ignores."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    writes: tuple[Write, ...] | None
    _plain: Any = field(default=..., init=False, repr=False, compare=False)
    """What ``plain`` found; an ellipsis before it was asked."""

    @property
    def plain(self) -> Write | None:
        """The one write, if all of the weight goes as it is into contiguous elements."""
        if self._plain is ...:
            object.__setattr__(self, "_plain", self._find_plain())
        found: Write | None = self._plain
        return found

    def _find_plain(self) -> Write | None:
        if self.writes is None or len(self.writes) != 1:
            return None
        write = self.writes[0]
        same = write.source_dtype == write.target_dtype == self.dtype
        whole = write.source == Geometry.contiguous(self.shape)
        there = write.target == Geometry.contiguous(write.target.size, write.target.offset)
        return write if same and whole and there and write.target.size == self.shape else None

    def fits(self, tensor: torch.Tensor) -> bool:
        return tensor.shape == self.shape and tensor.dtype == self.dtype


Slot = tuple[str, Geometry]
"""A parameter, and the elements of it that are written."""


@dataclass(frozen=True)
class Routes:
    """The routes of a whole checkpoint into one model."""

    key: object
    """Everything beside the weights themselves that the routes depend on (placement of experts)."""
    of: Mapping[str, Route]
    contested: Mapping[Slot, Collection[str]] = field(default_factory=dict)
    """Slots that several weights are written to, and those: layers that are fused share one input scale."""

    @functools.cached_property
    def contenders(self) -> frozenset[str]:
        """The weights that share a slot with another."""
        return frozenset(itertools.chain.from_iterable(self.contested.values()))

    @functools.cached_property
    def computed(self) -> int:
        """Weights that still need the model's loader."""
        return sum(route.writes is None for route in self.of.values())


def follow(route: Route, tensor: torch.Tensor, memory: Callable[[str], torch.UntypedStorage]) -> None:
    """Write ``tensor`` where its route says.

    Args:
        route: a route with writes that fits the tensor.
        tensor: the weight, on any device and in any layout.
        memory: staging of a parameter, allocated.

    """
    assert route.writes is not None, "computed weights go through the loader"
    if route.plain is not None and _moved(route.plain, tensor, memory):
        return
    source = tensor.detach()
    if any(write.source is not None for write in route.writes) and not source.is_contiguous():
        source = source.contiguous()
    for write in route.writes:
        target = torch.empty(0, dtype=write.target_dtype, device=memory(write.parameter).device)
        view = target.set_(
            memory(write.parameter), write.target.offset, write.target.size, write.target.stride
        )
        if write.source is None:
            view.fill_(write.value)
        else:
            base = source if write.source_dtype == source.dtype else source.view(write.source_dtype)
            offset = base.storage_offset() + write.source.offset
            copy_into(view, base.as_strided(write.source.size, write.source.stride, offset))


_DIRECT_BYTES = 1 << 20
"""Plain memory up to this size is moved by one core: for an expert's matrix, waking the others and
waiting for them costs more than the copy."""


def _moved(write: Write, tensor: torch.Tensor, memory: Callable[[str], torch.UntypedStorage]) -> bool:
    """Whether a weight that goes as it is was moved to its place, bytes by bytes and without a tensor there.

    That takes a few microseconds less than a copy, and is nearly all that many small experts cost.
    """
    if type(tensor) not in _PLAIN_CLASSES or not tensor.is_cpu or not tensor.is_contiguous():
        return False
    nbytes, source = tensor.nbytes, tensor.data_ptr()
    if nbytes > _DIRECT_BYTES or not source or tensor.is_conj() or tensor.is_neg():
        return False
    target, start = memory(write.parameter), write.target.offset * write.target_dtype.itemsize
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
