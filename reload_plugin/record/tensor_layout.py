"""Layout and load format of a tensor or of a region of it, without any storage. Pure data."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

SMALL_BYTES = 64 * 1024
"""Initial values up to this size are kept as a copy; larger ones only as a description."""


@dataclass(frozen=True)
class Uninitialised:
    """Memory that the constructor did not write: every element has to come from the checkpoint."""


@dataclass(frozen=True)
class Constant:
    """Every element was set to one value by the constructor (padding zeros, ``ones`` scales)."""

    value: complex | float | int | bool


@dataclass(frozen=True, eq=False)
class Values:
    """The constructor's values; the record owns this copy (at most ``SMALL_BYTES``), in host memory, which no
    device's sleep mode discards.
    """

    tensor: torch.Tensor


@dataclass(frozen=True)
class AsServed:
    """Large values that the constructor computed (rotary tables): copied from the served tensor."""


Initial = Uninitialised | Constant | Values | AsServed
"""What a load-format tensor holds before a loader writes into it."""


@functools.lru_cache(maxsize=4096)
def shared(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The same object for equal sizes, which saves memory: a checkpoint has many tensors and few shapes."""
    return sizes


@dataclass(frozen=True, slots=True)
class Geometry:
    """A strided view of a storage, in elements."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> Geometry:
        size, stride = shared(tuple(tensor.shape)), shared(tuple(tensor.stride()))
        return Geometry(int(tensor.storage_offset()), size, stride)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def contiguous(size: tuple[int, ...], offset: int = 0) -> Geometry:
        stride = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
        return Geometry(offset, size, stride)

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def view(self, base: torch.Tensor) -> torch.Tensor:
        """The same view of ``base``'s storage."""
        return base.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, eq=False)
class TensorFormat:
    """Load format of one tensor: what a ``weight_loader`` writes into, without its values."""

    name: str
    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    cls: type[torch.Tensor]
    requires_grad: bool
    attributes: dict[str, Any] = field(repr=False)
    initial: Initial = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.geometry.size

    @functools.cached_property
    def nbytes(self) -> int:
        return self.geometry.numel * self.dtype.itemsize

    @functools.cached_property
    def end(self) -> int:
        """Bytes from the start of its storage to the end of its last element."""
        offset, steps = self.geometry.offset, zip(self.geometry.size, self.geometry.stride, strict=True)
        last = offset + sum((n - 1) * stride for n, stride in steps)
        return (last + 1 if self.geometry.numel else offset) * self.dtype.itemsize
