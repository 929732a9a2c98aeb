"""Where a tensor lies in open files: in one piece, in parts, or to be looked up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ...plan.source import TensorInfo


@dataclass(frozen=True, slots=True)
class ContiguousLocation:
    """Where a tensor lies in one piece: file (or what its checkpoint calls it), first byte, bytes."""

    info: TensorInfo
    file: str
    start: int
    nbytes: int

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold it."""
        return (self.file,)

    @property
    def extents(self) -> Iterator[tuple[str, int, int]]:
        """File, first byte and end of all that is read for it."""
        yield self.file, self.start, self.start + self.nbytes


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor, and how its elements lie in a file."""

    offsets: tuple[int, ...]
    """Where the box begins in the tensor."""
    sizes: tuple[int, ...]
    file: str
    start: int
    """First byte of the first element."""
    strides: tuple[int, ...]
    """In elements, one a dimension, none negative."""

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.sizes)

    @property
    def in_one_piece(self) -> bool:
        """Whether the elements lie one behind the other, in order."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def extent(self) -> int:
        """Elements from the first to the last, those between them included."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))


@dataclass(frozen=True)
class AssembledLocation:
    """A tensor that is put together from parts, which cover it and do not overlap."""

    info: TensorInfo
    parts: tuple[StoredBox, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold it."""
        return tuple(dict.fromkeys(part.file for part in self.parts))

    @property
    def extents(self) -> Iterator[tuple[str, int, int]]:
        """File, first byte and end of all that is read for it, the gaps in strided parts included."""
        size = self.info.dtype.itemsize
        return ((part.file, part.start, part.start + part.extent * size) for part in self.parts if part.numel)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.info.shape) * self.info.dtype.itemsize


@dataclass(frozen=True)
class UnresolvedLocation:
    """A tensor whose exact places are looked up when it is about to be read."""

    info: TensorInfo
    files: tuple[str, ...]
    resolve: Callable[[Mapping[str, int]], AssembledLocation] = field(repr=False, compare=False)
    """Descriptors by file -> where it lies."""


TensorLocation = ContiguousLocation | AssembledLocation | UnresolvedLocation


def location_of(info: TensorInfo, part: StoredBox) -> ContiguousLocation | AssembledLocation:
    """A tensor that lies in one file, in whatever layout."""
    if not part.numel or part.in_one_piece:
        return ContiguousLocation(info, part.file, part.start, part.numel * info.dtype.itemsize)
    return AssembledLocation(info, (part,))
