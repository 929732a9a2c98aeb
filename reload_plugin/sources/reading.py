"""One pass over tensors that lie in open files: where each is read to, and what is read together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..memory import HostPool, uses
from .base import Room, Stream, TensorInfo
from .readahead import Batch, Piece, ReadAhead

AHEAD = 16 << 20
"""Bytes that are being read before they are asked for; one batch more at most."""
BATCH = 2 << 20
"""Bytes from which on tensors are not read together with the next."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: file, first byte, number of bytes."""

    info: TensorInfo
    file: str
    start: int
    nbytes: int


def read_places(
    places: Sequence[Place], handles: Mapping[str, int], pool: HostPool, room: Room | None
) -> Stream:
    """The tensors at ``places``, in that order.

    Args:
        places: what to read.
        handles: file -> descriptor; the caller's, open until the iterator is closed.
        pool: memory for tensors that ``room`` has no place for.
        room: see ``Source.read``.

    """
    yield from _Reading(handles, pool, room).all(places)


class _Reading:
    """One pass over the tensors: batches are asked for ahead of the tensor that is handed out."""

    def __init__(self, handles: Mapping[str, int], pool: HostPool, room: Room | None) -> None:
        self._handles = handles
        self._pool = pool
        self._room = room
        self._lent: list[torch.UntypedStorage] = []

    def all(self, places: Sequence[Place]) -> Iterator[tuple[str, torch.Tensor]]:
        waiting: deque[tuple[list[Place], list[torch.Tensor], Batch]] = deque()
        ahead = 0
        batches = _batches(places)
        following = next(batches, None)
        with ReadAhead() as reader:
            while following or waiting:
                while following and (not waiting or (reader.threaded and ahead < AHEAD)):
                    tensors = [self._memory(place) for place in following]
                    waiting.append((following, tensors, reader.submit(self._pieces(following, tensors))))
                    ahead += sum(place.nbytes for place in following)
                    following = next(batches, None)
                batch, tensors, read = waiting.popleft()
                read.wait()
                ahead -= sum(place.nbytes for place in batch)
                del read
                tensors.reverse()
                for place in batch:
                    yield place.info.name, tensors.pop()
                self._take_back()

    def _pieces(self, places: Sequence[Place], tensors: Sequence[torch.Tensor]) -> list[Piece]:
        return [
            Piece(self._handles[place.file], place.start, tensor, place.file, place.info.name)
            for place, tensor in zip(places, tensors, strict=True)
        ]

    def _memory(self, place: Place) -> torch.Tensor:
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


def _batches(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Tensors that are read by one request: small ones together."""
    batch: list[Place] = []
    nbytes = 0
    for place in places:
        batch.append(place)
        nbytes += place.nbytes
        if nbytes >= BATCH:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
