"""One pass over tensors in open files: batches are submitted ahead, tensors are handed out in order."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ...device.host_memory import HostPool
from ...plan.source import Destinations, DirectRead, Region, Stream
from .locations import AssembledLocation, ContiguousLocation, StoredBox, TensorLocation, UnresolvedLocation
from .read_batches import DirectReadPlan, ReadBatch, read_batches_of
from .readahead import Batch, GappedRun, PageCache, Piece, ReadAhead, Run, read_piece, runs_of
from .vectored import iovec_of

AHEAD = 16 << 20
"""Bytes that are read before the caller asks for them; exceeded by one batch at most."""
ANNOUNCED = 32 << 20
"""Bytes beyond those being read that are announced to the kernel (``POSIX_FADV_WILLNEED``)."""
SCRATCH = 8 << 20
"""Bytes of the buffer for boxes whose layout in the file is not that of the tensor."""


_PendingRead = tuple[ReadBatch, list[torch.Tensor] | DirectRead, Batch]
"""A batch, what it is read into (a tensor each, or parameters), and the submitted request."""


def read_locations(
    places: Iterable[TensorLocation],
    handles: Mapping[str, int],
    pool: HostPool,
    destinations: Destinations | None,
) -> Stream:
    """Read the tensors at ``places``, in that order.

    Args:
        places: what to read.
        handles: file -> descriptor; the caller's, open until the iterator is closed.
        pool: allocates the tensors that ``destinations`` has no memory for.
        destinations: see ``Source.read``.

    """
    settled = (place.resolve(handles) if isinstance(place, UnresolvedLocation) else place for place in places)
    yield from read_in_batches(read_batches_of(settled), handles, {}, pool, destinations)


def read_in_batches(
    batches: Iterable[ReadBatch],
    handles: Mapping[str, int],
    paths: Mapping[str, str],
    pool: HostPool,
    destinations: Destinations | None,
) -> Stream:
    """As ``read_locations``, for tensors that are batched already.

    Args:
        batches: what to read.
        handles: name of a file in the locations -> descriptor, as there.
        paths: name of a file in the locations -> its path, for messages, where the two differ.
        pool: as there.
        destinations: as there.

    """
    yield from _Reading(handles, paths, pool, destinations).all(iter(batches))  # type: ignore[misc]


def _announced(
    batches: Iterable[ReadBatch],
    handles: Mapping[str, int],
    cache: PageCache,
    destinations: Destinations | None,
) -> Iterator[ReadBatch]:
    """The batches, each announced to the kernel ``ANNOUNCED`` bytes early once a read missed the page cache,
    so that the disk works meanwhile.
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
            _announce(untold.popleft().extents_for(destinations), handles)
        if not window:
            return
        first = window.popleft()
        nbytes -= first.nbytes
        if untold and untold[0] is first:
            untold.popleft()
        yield first


def _announce(extents: Iterable[tuple[str, int, int]], handles: Mapping[str, int]) -> None:
    for file, start, end in extents if hasattr(os, "posix_fadvise") else ():
        with contextlib.suppress(OSError):  # it is advice
            os.posix_fadvise(handles[file], start, end - start, os.POSIX_FADV_WILLNEED)


class _Reading:
    """One pass over the tensors: batches are submitted ahead of the tensor that is handed out."""

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
        waiting: deque[_PendingRead] = deque()
        ahead = 0
        with ReadAhead() as reader:
            batches = _announced(batches, self._handles, reader.cache, self._destinations)
            more = True
            while True:
                while more and (not waiting or (reader.threaded and ahead < AHEAD)):
                    following = next(batches, None)
                    if more := following is not None:
                        waiting.append(self._submit(reader, following))
                        ahead += following.nbytes
                if not waiting:
                    return
                batch, tensors, read = waiting.popleft()
                read.wait()
                ahead -= batch.nbytes
                self._note_read(read.nbytes)
                del read
                if isinstance(tensors, DirectRead):
                    yield tensors
                    continue
                tensors.reverse()
                for place in batch.locations:
                    if isinstance(place, AssembledLocation):
                        self._gather(place, tensors[-1])
                    yield place.info.name, tensors.pop()

    def _submit(self, reader: ReadAhead, batch: ReadBatch) -> _PendingRead:
        """Submit a batch: into parameters if there is a plan for all of it, else into a tensor each."""
        direct_read_plan = (
            batch.direct_read_plan(self._destinations) if self._destinations is not None else None
        )
        if direct_read_plan is not None and (memory := self._memory_for(direct_read_plan)) is not None:
            return (
                batch,
                direct_read_plan.direct_read,
                reader.submit(self._runs(batch, direct_read_plan, memory), memory),
            )
        tensors = [self._memory(place) for place in batch.locations]
        pieces, gapped = self._pieces(batch.locations, tensors)
        return batch, tensors, reader.submit([*runs_of(pieces), *gapped], tensors[:])

    def _note_read(self, nbytes: int) -> None:
        if self._destinations is not None:
            self._destinations.note_read(nbytes)

    def _memory_for(self, direct_read_plan: DirectReadPlan) -> list[torch.UntypedStorage] | None:
        assert self._destinations is not None, "a plan comes from destinations"
        found = []
        for parameter in direct_read_plan.direct_read.parameters:
            memory = self._destinations.memory(parameter)
            if memory is None:
                return None
            found.append(memory)
        return found

    def _runs(
        self, batch: ReadBatch, direct_read_plan: DirectReadPlan, memory: Sequence[torch.UntypedStorage]
    ) -> list[Run | GappedRun]:
        """The reads of a direct plan. Raises IndexError where a part lies outside of its parameter."""
        numbers, first, length = direct_read_plan.parts
        if any(end > storage.nbytes() for end, storage in zip(direct_read_plan.ends, memory, strict=True)):
            raise IndexError(
                f"A weight is longer than its place in {', '.join(direct_read_plan.direct_read.parameters)}"
            )
        addresses = np.array([storage.data_ptr() for storage in memory], dtype=np.int64)
        parts = iovec_of(addresses[numbers] + first, length)
        handles = self._handles
        of = {
            file: functools.partial(batch.place_at, file, self._paths.get(file, file))
            for file in {place.file for place in batch.locations if isinstance(place, ContiguousLocation)}
        }
        runs: list[Run | GappedRun] = [
            Run(handles[file], start, parts.rows(begin, end), nbytes, of[file])
            for file, start, nbytes, begin, end in direct_read_plan.ranges
        ]
        for file, start, step, nbytes, count, parameter, target, target_step in direct_read_plan.gapped:
            address = int(addresses[parameter]) + target
            runs.append(GappedRun(handles[file], start, step, nbytes, count, address, target_step, of[file]))
        return runs

    def _pieces(
        self, places: Sequence[ContiguousLocation | AssembledLocation], tensors: Sequence[torch.Tensor]
    ) -> tuple[list[Piece], list[GappedRun]]:
        """The reads of tensors that are handed over, without bytes that nobody looks at."""
        pieces: list[Piece] = []
        gapped: list[GappedRun] = []
        for place, tensor in zip(places, tensors, strict=True):
            needed = None if self._destinations is None else self._destinations.needed(place.info)
            if needed is None or (needed and isinstance(place, AssembledLocation)):
                pieces += self._direct_pieces(place, tensor)
            elif isinstance(place, ContiguousLocation):
                self._add_needed(place, tensor, needed, pieces, gapped)
        return pieces, gapped

    def _add_needed(
        self,
        place: ContiguousLocation,
        tensor: torch.Tensor,
        needed: Sequence[Region],
        pieces: list[Piece],
        gapped: list[GappedRun],
    ) -> None:
        """The reads of some bytes of a tensor, each to where it lies in the whole tensor."""
        path, handle = self._paths.get(place.file, place.file), self._handles[place.file]
        for region in needed:
            start = place.start + region.source
            if region.runs == 1:
                name, skipped = place.info.name, region.source
                pieces.append(Piece(handle, start, tensor, path, name, skipped, region.nbytes))
                continue
            step = region.source_step
            address = tensor.data_ptr() + region.source
            named = functools.partial(_named, path, place.info.name)
            gapped.append(GappedRun(handle, start, step, region.nbytes, region.runs, address, step, named))

    def _direct_pieces(
        self, place: ContiguousLocation | AssembledLocation, tensor: torch.Tensor
    ) -> Iterator[Piece]:
        """The reads of a tensor that need no intermediate buffer."""
        if isinstance(place, ContiguousLocation):
            path = self._paths.get(place.file, place.file)
            yield Piece(self._handles[place.file], place.start, tensor, path, place.info.name)
            return
        for part in place.parts:
            box = _box(tensor, part)
            if part.numel and _is_direct(part, box):
                yield Piece(self._handles[part.file], part.start, box, part.file, place.info.name)

    def _gather(self, place: AssembledLocation, tensor: torch.Tensor) -> None:
        """Read the boxes whose layout in the file is not that of the tensor, through a buffer."""
        if self._destinations is not None and self._destinations.needed(place.info) == ():
            return
        for part in place.parts:
            box = _box(tensor, part)
            if part.numel and not _is_direct(part, box):
                _copy_strided(self._handles[part.file], part, box, place.info.name)
                self._note_read(part.extent * tensor.element_size())

    def _memory(self, place: ContiguousLocation | AssembledLocation) -> torch.Tensor:
        """The memory that a tensor is read into: its destination, or the pool's."""
        found = None if self._destinations is None else self._destinations(place.info)
        if found is not None:
            return found
        empty = torch.empty(0, dtype=place.info.dtype, device="cpu")
        meta = place.info.meta()
        return empty.set_(self._pool.take(place.nbytes), 0, meta.shape, meta.stride())


def _named(path: str, name: str, position: int) -> tuple[str, str]:
    del position
    return path, name


def _box(tensor: torch.Tensor, part: StoredBox) -> torch.Tensor:
    """The view of a tensor that a stored box fills."""
    for dim, (start, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def _is_direct(part: StoredBox, box: torch.Tensor) -> bool:
    return part.is_contiguous and box.is_contiguous()


def _copy_strided(handle: int, part: StoredBox, box: torch.Tensor, name: str) -> None:
    """Read a stored box in ranges of at most ``SCRATCH`` bytes, and copy each into the tensor."""
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
        piece = StoredBox(part.offsets, sizes, part.file, start, part.strides)
        _copy_strided(handle, piece, box.narrow(dim, first, size), name)


def _read_whole(handle: int, part: StoredBox, flat: torch.Tensor, name: str) -> None:
    read_piece(Piece(handle, part.start, flat, part.file, name))
