"""One pass over tensors that lie in open files: where each is read to, and what is read together."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..memory import HostPool, uses
from .base import Landed, Room, Stream, TensorInfo
from .readahead import Batch, Piece, ReadAhead, Spot

AHEAD = 16 << 20
"""Bytes that are being read before they are asked for; one batch more at most."""
BATCH = 2 << 20
"""Bytes from which on tensors are not read together with the next."""
SCRATCH = 8 << 20
"""Bytes of a file that are read at once on their way to memory of another layout."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in one piece: file, first byte, number of bytes."""

    info: TensorInfo
    file: str
    start: int
    nbytes: int

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold it."""
        return (self.file,)


@dataclass(frozen=True)
class Part:
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
class Assembly:
    """A tensor that is put together from parts, which cover it and do not overlap."""

    info: TensorInfo
    parts: tuple[Part, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold it."""
        return tuple(dict.fromkeys(part.file for part in self.parts))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.info.shape) * self.info.dtype.itemsize


@dataclass(frozen=True)
class Deferred:
    """A tensor whose exact places are looked up when it is about to be read."""

    info: TensorInfo
    files: tuple[str, ...]
    resolve: Callable[[Mapping[str, int]], Assembly] = field(repr=False, compare=False)
    """Descriptors by file -> where it lies."""


Placed = Place | Assembly | Deferred

_Asked = tuple[list[Place | Assembly], list[torch.Tensor] | None, Batch]
"""Places, the tensors they are read to (None where they land at once), and their reading."""


def placed(info: TensorInfo, part: Part) -> Place | Assembly:
    """A tensor that lies in one file, in whatever layout."""
    if not part.numel or part.in_one_piece:
        return Place(info, part.file, part.start, part.numel * info.dtype.itemsize)
    return Assembly(info, (part,))


def read_places(
    places: Iterable[Placed], handles: Mapping[str, int], pool: HostPool, room: Room | None
) -> Stream:
    """The tensors at ``places``, in that order.

    Args:
        places: what to read.
        handles: file -> descriptor; the caller's, open until the iterator is closed.
        pool: memory for tensors that ``room`` has no place for.
        room: see ``Source.read``.

    """
    settled = (place.resolve(handles) if isinstance(place, Deferred) else place for place in places)
    yield from _Reading(handles, pool, room).all(settled)  # type: ignore[misc]


class _Reading:
    """One pass over the tensors: batches are asked for ahead of the tensor that is handed out."""

    def __init__(self, handles: Mapping[str, int], pool: HostPool, room: Room | None) -> None:
        self._handles = handles
        self._pool = pool
        self._room = room
        self._lent: list[torch.UntypedStorage] = []

    def all(self, places: Iterable[Place | Assembly]) -> Iterator[tuple[str, torch.Tensor] | Landed]:
        waiting: deque[_Asked] = deque()
        ahead = 0
        batches = _batches(places)
        following = next(batches, None)
        with ReadAhead() as reader:
            while following or waiting:
                while following and (not waiting or (reader.threaded and ahead < AHEAD)):
                    waiting.append(self._ask(reader, following))
                    ahead += sum(place.nbytes for place in following)
                    following = next(batches, None)
                batch, tensors, read = waiting.popleft()
                read.wait()
                ahead -= sum(place.nbytes for place in batch)
                del read
                if tensors is None:
                    yield Landed([place.info for place in batch])
                    continue
                tensors.reverse()
                for place in batch:
                    if isinstance(place, Assembly):
                        self._gather(place, tensors[-1])
                    yield place.info.name, tensors.pop()
                self._take_back()

    def _ask(self, reader: ReadAhead, places: list[Place | Assembly]) -> _Asked:
        """Have a batch read: to where all of it goes if that is known, else to a tensor each."""
        spots = self._spots(places)
        if spots is not None:
            return places, None, reader.submit(*spots)
        tensors = [self._memory(place) for place in places]
        return places, tensors, reader.submit(self._pieces(places, tensors))

    def _spots(
        self, places: Sequence[Place | Assembly]
    ) -> tuple[list[Spot], list[torch.UntypedStorage]] | None:
        if self._room is None:
            return None
        plain = [place for place in places if isinstance(place, Place)]
        found = self._room.addresses([place.info for place in plain]) if len(plain) == len(places) else None
        if found is None:
            return None
        addresses, held = found
        handles = self._handles
        return [
            Spot(handles[place.file], place.start, address, place.nbytes, place.file, place.info.name)
            for place, address in zip(plain, addresses, strict=True)
        ], held

    def _pieces(self, places: Sequence[Place | Assembly], tensors: Sequence[torch.Tensor]) -> list[Piece]:
        pairs = zip(places, tensors, strict=True)
        return [piece for place, tensor in pairs for piece in self._direct_pieces(place, tensor)]

    def _direct_pieces(self, place: Place | Assembly, tensor: torch.Tensor) -> Iterator[Piece]:
        """What can be read straight to where it belongs."""
        if isinstance(place, Place):
            yield Piece(self._handles[place.file], place.start, tensor, place.file, place.info.name)
            return
        for part in place.parts:
            box = _box(tensor, part)
            if part.numel and _is_direct(part, box):
                yield Piece(self._handles[part.file], part.start, box, part.file, place.info.name)

    def _gather(self, place: Assembly, tensor: torch.Tensor) -> None:
        """Read the parts that have another layout in the file than in the tensor."""
        for part in place.parts:
            box = _box(tensor, part)
            if part.numel and not _is_direct(part, box):
                _copy_strided(self._handles[part.file], part, box, place.info.name)

    def _memory(self, place: Place | Assembly) -> torch.Tensor:
        """Where a tensor is read to: the room it will end up in, or memory of the pool."""
        found = None if self._room is None else self._room(place.info)
        if found is not None:
            return found
        storage = self._pool.take(place.nbytes)
        self._lent.append(storage)
        empty = torch.empty(0, dtype=place.info.dtype, device="cpu")
        meta = place.info.meta()
        return empty.set_(storage, 0, meta.shape, meta.stride())

    def _take_back(self) -> None:
        """Put what nobody refers to any more into the pool; the rest is still lent."""
        for storage in self._lent:
            if uses(storage) == 1:
                self._pool.give(storage)
        self._lent = [storage for storage in self._lent if uses(storage) > 1]


def _box(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The elements of a tensor that a part brings."""
    for dim, (start, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def _is_direct(part: Part, box: torch.Tensor) -> bool:
    return part.in_one_piece and box.is_contiguous()


def _copy_strided(handle: int, part: Part, box: torch.Tensor, name: str) -> None:
    """Read a part by ranges of at most ``SCRATCH`` bytes, and copy from there."""
    itemsize = box.element_size()
    if part.extent * itemsize <= SCRATCH or part.extent == 1:
        flat = torch.empty(part.extent, dtype=box.dtype)
        _read_whole(handle, part, flat, name)
        box.copy_(flat.as_strided(part.sizes, part.strides))
        return
    dim = max(range(len(part.sizes)), key=lambda d: (part.sizes[d] - 1) * part.strides[d])
    half = part.sizes[dim] // 2
    for first, size in ((0, half), (half, part.sizes[dim] - half)):
        sizes = (*part.sizes[:dim], size, *part.sizes[dim + 1 :])
        start = part.start + first * part.strides[dim] * itemsize
        piece = Part(part.offsets, sizes, part.file, start, part.strides)
        _copy_strided(handle, piece, box.narrow(dim, first, size), name)


def _read_whole(handle: int, part: Part, flat: torch.Tensor, name: str) -> None:
    batch = Batch([Piece(handle, part.start, flat, part.file, name)], by_waiter=True)
    batch.wait()


def _batches(places: Iterable[Place | Assembly]) -> Iterator[list[Place | Assembly]]:
    """Tensors that are read by one request: small ones together."""
    batch: list[Place | Assembly] = []
    nbytes = 0
    for place in places:
        batch.append(place)
        nbytes += place.nbytes
        if nbytes >= BATCH:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
