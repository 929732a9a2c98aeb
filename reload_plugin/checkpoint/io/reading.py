"""One pass over tensors that lie in open files: where each is read to, and what is read together."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...device.host_memory import HostPool
from ...plan.source import Destinations, DirectRead, Stream, TensorInfo
from .readahead import SHARED, Batch, PageCache, Piece, ReadAhead, Run, read_piece, runs_of, spare_readers
from .vectored import IOV_MAX, parts_at

AHEAD = 16 << 20
"""Bytes that are being read before they are asked for; one batch more at most."""
ANNOUNCED = 32 << 20
"""Bytes ahead of those being read that the system is told of; they go to its page cache."""
BATCH = 16 << 20
"""Bytes from which on tensors are not read together with the next, where the kernels' team reads: it takes
0.3 ms to come together and to part. Where there are threads that only read, each reads half as many, so that
several are at work."""
SCRATCH = 8 << 20
"""Bytes of a file that are read at once on their way to memory of another layout."""


@dataclass(frozen=True, slots=True)
class Place:
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
    def extents(self) -> Iterator[tuple[str, int, int]]:
        """File, first byte and end of all that is read for it, the gaps in strided parts included."""
        size = self.info.dtype.itemsize
        return ((part.file, part.start, part.start + part.extent * size) for part in self.parts if part.numel)

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


class FileRange(NamedTuple):
    """Neighbouring bytes of a file, at most ``SHARED``, and the parameters' memory that they go to."""

    file: str
    start: int
    nbytes: int
    first: int
    last: int
    """The first of the landing's parts, and the one behind the last."""


@dataclass(frozen=True, eq=False)
class DirectReadPlan:
    """How tensors that go as they are get from files to parameters."""

    direct_read: DirectRead
    stretches: Sequence[FileRange]
    parts: npt.NDArray[np.int64]
    """[3, parts]: number of the parameter, first byte, and number of bytes of each."""

    @functools.cached_property
    def ends(self) -> Sequence[int]:
        """Bytes that the memory of each parameter has at least."""
        numbers, first, length = self.parts
        found = np.zeros(len(self.direct_read.parameters), dtype=np.int64)
        np.maximum.at(found, numbers, first + length)
        return found.tolist()


@dataclass(eq=False)
class ReadBatch:
    """Tensors that one request reads. May be kept for the next reading of the same listing."""

    places: Sequence[Place | Assembly]
    nbytes: int
    _landing: tuple[object, DirectReadPlan | None] = (None, None)
    """The last answer of ``direct_read_plan``, and the key it was found by."""

    def direct_read_plan(self, destinations: Destinations) -> DirectReadPlan | None:
        """How to read all of it to where it goes; None unless that can be."""
        key = destinations.key
        if key is None:
            return None
        # One read and one write of the attribute: another thread may replace it at any time.
        last_key, plan = self._landing
        if last_key is not key:
            plan = self._direct_read_plan_in(destinations)
            self._landing = key, plan
        return plan

    def _direct_read_plan_in(self, destinations: Destinations) -> DirectReadPlan | None:
        places = [place for place in self.places if isinstance(place, Place)]
        targets = (
            destinations.targets([place.info for place in places])
            if len(places) == len(self.places)
            else None
        )
        if targets is None:
            return None
        parameters: dict[str, list[str]] = {}
        for place, (parameter, _) in zip(places, targets, strict=True):
            parameters.setdefault(parameter, []).append(place.info.name)
        shapes = {place.info.name: place.info.shape for place in places}
        direct_read = DirectRead(tuple(shapes), shapes, self.nbytes, parameters)
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        return DirectReadPlan(
            direct_read, *_file_ranges(places, [(numbers[name], start) for name, start in targets])
        )

    @functools.cached_property
    def extents(self) -> Sequence[tuple[str, int, int]]:
        """File, first byte and end of what it reads; neighbours together."""
        found: list[tuple[str, int, int]] = []
        for file, start, end in (extent for place in self.places for extent in place.extents):
            if found and found[-1][0] == file and found[-1][2] == start:
                start = found.pop()[1]
            found.append((file, start, end))
        return found

    def place_at(self, file: str, path: str, position: int) -> tuple[str, str]:
        """The tensor that a byte of a file belongs to, behind the file's path."""
        inside = (p for p in self.places if isinstance(p, Place) and p.file == file)
        return path, next(p.info.name for p in inside if p.start <= position < p.start + p.nbytes)


def _file_ranges(
    places: Sequence[Place], targets: Sequence[tuple[int, int]]
) -> tuple[list[FileRange], npt.NDArray[np.int64]]:
    """Neighbours in a file together, and in memory too where they are neighbours in both; and their parts."""
    found: list[FileRange] = []
    parts: list[tuple[int, int, int]] = []
    file, start, end, first = "", 0, -1, 0

    def ended() -> None:
        if end > start:
            found.append(FileRange(file, start, end - start, first, len(parts)))

    for place, (parameter, target) in zip(places, targets, strict=True):
        done = 0
        while done < place.nbytes:
            if place.file != file or place.start + done != end or len(parts) - first >= IOV_MAX:
                ended()
                file, start, end, first = place.file, place.start + done, place.start + done, len(parts)
            nbytes = min(place.nbytes - done, start + SHARED - end)
            before = parts[-1] if len(parts) > first else None
            if before is not None and before[0] == parameter and before[1] + before[2] == target + done:
                parts[-1] = (parameter, before[1], before[2] + nbytes)
            else:
                parts.append((parameter, target + done, nbytes))
            done += nbytes
            end += nbytes
            if end - start == SHARED:
                ended()
                start, first = end, len(parts)
    ended()
    return found, np.array(parts, dtype=np.int64).reshape(-1, 3).T.copy()


_Asked = tuple[ReadBatch, list[torch.Tensor] | DirectRead, Batch]
"""A parcel, the tensors it is read to or where it lands, and its reading."""


def placed(info: TensorInfo, part: Part) -> Place | Assembly:
    """A tensor that lies in one file, in whatever layout."""
    if not part.numel or part.in_one_piece:
        return Place(info, part.file, part.start, part.numel * info.dtype.itemsize)
    return Assembly(info, (part,))


def read_places(
    places: Iterable[Placed], handles: Mapping[str, int], pool: HostPool, destinations: Destinations | None
) -> Stream:
    """The tensors at ``places``, in that order.

    Args:
        places: what to read.
        handles: file -> descriptor; the caller's, open until the iterator is closed.
        pool: memory for tensors that ``destinations`` has no place for.
        destinations: see ``Source.read``.

    """
    settled = (place.resolve(handles) if isinstance(place, Deferred) else place for place in places)
    yield from read_in_batches(read_batches_of(settled), handles, {}, pool, destinations)


def read_in_batches(
    batches: Iterable[ReadBatch],
    handles: Mapping[str, int],
    paths: Mapping[str, str],
    pool: HostPool,
    destinations: Destinations | None,
) -> Stream:
    """The same for tensors that are sorted into parcels; ``paths`` says where files are that have names."""
    yield from _Reading(handles, paths, pool, destinations).all(iter(batches))  # type: ignore[misc]


def read_batches_of(places: Iterable[Place | Assembly]) -> Iterator[ReadBatch]:
    """Tensors that are read by one request: small ones together."""
    enough = BATCH // 2 if spare_readers() > 0 else BATCH
    batch: list[Place | Assembly] = []
    nbytes = 0
    for place in places:
        batch.append(place)
        nbytes += place.nbytes
        if nbytes >= enough:
            yield ReadBatch(batch, nbytes)
            batch, nbytes = [], 0
    if batch:
        yield ReadBatch(batch, nbytes)


def _announced(
    batches: Iterable[ReadBatch], handles: Mapping[str, int], cache: PageCache
) -> Iterator[ReadBatch]:
    """The parcels; once reads have to wait, the system is told of each some time before, so that a cold disk
    reads meanwhile.
    """
    batches = iter(batches)
    window: deque[ReadBatch] = deque()
    untold: deque[ReadBatch] = deque()
    nbytes = 0
    while True:
        while nbytes <= ANNOUNCED and (batch := next(batches, None)) is not None:
            window.append(batch)
            untold.append(batch)
            nbytes += batch.nbytes
        while cache.missed and untold:
            _announce(untold.popleft(), handles)
        if not window:
            return
        first = window.popleft()
        nbytes -= first.nbytes
        if untold and untold[0] is first:
            untold.popleft()
        yield first


def _announce(batch: ReadBatch, handles: Mapping[str, int]) -> None:
    for file, start, end in batch.extents if hasattr(os, "posix_fadvise") else ():
        with contextlib.suppress(OSError):  # it is advice
            os.posix_fadvise(handles[file], start, end - start, os.POSIX_FADV_WILLNEED)


class _Reading:
    """One pass over the tensors: parcels are asked for ahead of the tensor that is handed out."""

    def __init__(
        self,
        handles: Mapping[str, int],
        paths: Mapping[str, str],
        pool: HostPool,
        destinations: Destinations | None,
    ) -> None:
        self._handles = handles
        self._paths = paths
        self._pool = pool
        self._destinations = destinations

    def all(self, batches: Iterator[ReadBatch]) -> Iterator[tuple[str, torch.Tensor] | DirectRead]:
        waiting: deque[_Asked] = deque()
        ahead = 0
        with ReadAhead() as reader:
            batches = _announced(batches, self._handles, reader.cache)
            more = True
            while True:
                while more and (not waiting or (reader.threaded and ahead < AHEAD)):
                    following = next(batches, None)
                    if more := following is not None:
                        waiting.append(self._ask(reader, following))
                        ahead += following.nbytes
                if not waiting:
                    return
                batch, tensors, read = waiting.popleft()
                read.wait()
                ahead -= batch.nbytes
                del read
                if isinstance(tensors, DirectRead):
                    yield tensors
                    continue
                tensors.reverse()
                for place in batch.places:
                    if isinstance(place, Assembly):
                        self._gather(place, tensors[-1])
                    yield place.info.name, tensors.pop()

    def _ask(self, reader: ReadAhead, batch: ReadBatch) -> _Asked:
        """Have a parcel read: to where all of it goes if that is known, else to a tensor each."""
        direct_read_plan = (
            batch.direct_read_plan(self._destinations) if self._destinations is not None else None
        )
        if direct_read_plan is not None and (memory := self._memory_for(direct_read_plan)) is not None:
            return (
                batch,
                direct_read_plan.direct_read,
                reader.submit(self._runs(batch, direct_read_plan, memory), memory),
            )
        tensors = [self._memory(place) for place in batch.places]
        return batch, tensors, reader.submit(runs_of(self._pieces(batch.places, tensors)), tensors[:])

    def _memory_for(self, direct_read_plan: DirectReadPlan) -> list[torch.UntypedStorage] | None:
        assert self._destinations is not None, "only a room has a landing"
        found = []
        for parameter in direct_read_plan.direct_read.parameters:
            memory = self._destinations.memory(parameter)
            if memory is None:
                return None
            found.append(memory)
        return found

    def _runs(
        self, batch: ReadBatch, direct_read_plan: DirectReadPlan, memory: Sequence[torch.UntypedStorage]
    ) -> list[Run]:
        """Raises IndexError where a part would lie outside of its parameter."""
        numbers, first, length = direct_read_plan.parts
        if any(end > storage.nbytes() for end, storage in zip(direct_read_plan.ends, memory, strict=True)):
            raise IndexError(
                f"A weight is longer than its place in {', '.join(direct_read_plan.direct_read.parameters)}"
            )
        addresses = np.array([storage.data_ptr() for storage in memory], dtype=np.int64)
        parts = parts_at(addresses[numbers] + first, length)
        handles = self._handles
        of = {
            file: functools.partial(batch.place_at, file, self._paths.get(file, file))
            for file in {stretch.file for stretch in direct_read_plan.stretches}
        }
        return [
            Run(handles[file], start, parts.rows(begin, end), nbytes, of[file])
            for file, start, nbytes, begin, end in direct_read_plan.stretches
        ]

    def _pieces(self, places: Sequence[Place | Assembly], tensors: Sequence[torch.Tensor]) -> list[Piece]:
        pairs = zip(places, tensors, strict=True)
        return [piece for place, tensor in pairs for piece in self._direct_pieces(place, tensor)]

    def _direct_pieces(self, place: Place | Assembly, tensor: torch.Tensor) -> Iterator[Piece]:
        """What can be read straight to where it belongs."""
        if isinstance(place, Place):
            path = self._paths.get(place.file, place.file)
            yield Piece(self._handles[place.file], place.start, tensor, path, place.info.name)
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
        found = None if self._destinations is None else self._destinations(place.info)
        if found is not None:
            return found
        empty = torch.empty(0, dtype=place.info.dtype, device="cpu")
        meta = place.info.meta()
        return empty.set_(self._pool.take(place.nbytes), 0, meta.shape, meta.stride())


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
        flat = torch.empty(part.extent, dtype=box.dtype, device="cpu")
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
    read_piece(Piece(handle, part.start, flat, part.file, name))
