"""Where a tensor lies in open files: contiguously, as boxes of one or more files, or to be looked up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ...plan.source import TensorInfo


@dataclass(frozen=True, slots=True)
class ContiguousLocation:
    """A tensor whose bytes lie contiguously and in order: file (or its name in the checkpoint), first byte,
    number of bytes.
    """

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
        """(file, first byte, end) of what is read for it."""
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
    def is_contiguous(self) -> bool:
        """Whether the elements lie contiguously, in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def extent(self) -> int:
        """Elements from the first to the last in the file, gaps included."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))


@dataclass(frozen=True)
class AssembledLocation:
    """A tensor assembled from stored boxes, which cover it and do not overlap."""

    info: TensorInfo
    parts: tuple[StoredBox, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold it."""
        return tuple(dict.fromkeys(part.file for part in self.parts))

    @property
    def extents(self) -> Iterator[tuple[str, int, int]]:
        """(file, first byte, end) of what is read for it, gaps in strided boxes included."""
        size = self.info.dtype.itemsize
        return ((part.file, part.start, part.start + part.extent * size) for part in self.parts if part.numel)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.info.shape) * self.info.dtype.itemsize


@dataclass(frozen=True)
class UnresolvedLocation:
    """A tensor whose boxes are looked up in its files when it is about to be read."""

    info: TensorInfo
    files: tuple[str, ...]
    resolve: Callable[[Mapping[str, int]], AssembledLocation] = field(repr=False, compare=False)
    """File -> open descriptor; returns the location. Raises SourceError where a file is damaged."""


TensorLocation = ContiguousLocation | AssembledLocation | UnresolvedLocation


def location_of(info: TensorInfo, part: StoredBox) -> ContiguousLocation | AssembledLocation:
    """The location of a tensor that is one stored box, in any layout."""
    if not part.numel or part.is_contiguous:
        return ContiguousLocation(info, part.file, part.start, part.numel * info.dtype.itemsize)
    return AssembledLocation(info, (part,))
