"""Safetensors files, read tensor by tensor with plain reads.

Not memory-mapped: a mapped file that is truncated while it is read kills the process, and mapped
pages count as resident memory until the mapping goes. Headers are parsed and checked by the
safetensors library.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import SourceError
from ..memory import HostPool, uses
from .base import Room, Stream, TensorInfo
from .readahead import Batch, Piece, ReadAhead

AHEAD = 16 << 20
"""Bytes that are being read before they are asked for; one batch more at most."""
BATCH = 2 << 20
"""Bytes from which on tensors are not read together with the next."""

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""Names of dtypes in a safetensors header (format description of the safetensors project)."""

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class _Place:
    info: TensorInfo
    file: str
    start: int
    nbytes: int


class SafetensorsSource:
    """One or many safetensors files as one checkpoint.

    Raises:
        SourceError: a file is missing, truncated or not safetensors, or two files hold one name.

    """

    def __init__(self, files: Sequence[str], description: str) -> None:
        self.description = description
        self._places: dict[str, _Place] = {}
        self.stamps: dict[str, Stamp] = {}
        """File -> size, time and inode when its header was read."""
        for file in files:
            self.stamps[file] = stamp_of(file)
            for place in _header(file):
                if place.info.name in self._places:
                    other = self._places[place.info.name].file
                    raise SourceError(
                        f"{place.info.name} is in two files of one checkpoint, {other} and {file}."
                    )
                self._places[place.info.name] = place

    def infos(self) -> Sequence[TensorInfo]:
        return [place.info for place in self._places.values()]

    def read(
        self, order: Sequence[str] | None = None, pool: HostPool | None = None, room: Room | None = None
    ) -> Stream:
        """Read ahead by up to 32 MiB on a thread of its own; close the iterator before memory that ``room``
        gave goes away. Memory that the caller has let go of is used again for later tensors.
        """
        places = [self._places[name] for name in (self._places if order is None else order)]
        with contextlib.ExitStack() as stack:
            reading = _Reading(stack, HostPool() if pool is None else pool, room)
            try:
                yield from reading.all(places)
                self._check_unchanged()
            except OSError as error:
                raise SourceError(f"{self.description} could not be read: {error}.") from error

    def unchanged(self) -> bool:
        try:
            return all(stamp_of(file) == stamp for file, stamp in self.stamps.items())
        except SourceError:
            return False

    def _check_unchanged(self) -> None:
        for file, stamp in self.stamps.items():
            if stamp_of(file) != stamp:
                raise SourceError(
                    f"{file} changed while it was read. Reload when the trainer has finished writing."
                )


def stamp_of(file: str) -> Stamp:
    """Size, modification time (ns) and inode of a file: what tells that it was rewritten."""
    try:
        found = Path(file).stat()
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error}.") from error
    return found.st_size, found.st_mtime_ns, found.st_ino


def _header(file: str) -> list[_Place]:
    """Where each tensor lies in the file; the library checks offsets and sizes first."""
    try:
        with safe_open(file, framework="pt"):
            pass
        with Path(file).open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{file} is not a whole safetensors file: {error}.") from error
    header.pop("__metadata__", None)
    return [_place(file, name, entry, 8 + length) for name, entry in header.items()]


def _place(file: str, name: str, entry: dict[str, Any], base: int) -> _Place:
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise SourceError(f"{name} in {file} has the dtype {entry['dtype']}, which torch has no name for.")
    start, end = entry["data_offsets"]
    info = TensorInfo(name, tuple(entry["shape"]), dtype)
    try:
        info.meta()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise SourceError(f"{name} in {file} has the shape {entry['shape']}, which no tensor has.") from error
    return _Place(info, file, base + int(start), int(end) - int(start))


class _Reading:
    """One pass over the tensors: batches are asked for ahead of the tensor that is handed out."""

    def __init__(self, stack: contextlib.ExitStack, pool: HostPool, room: Room | None) -> None:
        self._stack = stack
        self._pool = pool
        self._room = room
        self._handles: dict[str, int] = {}
        self._lent: list[torch.UntypedStorage] = []

    def all(self, places: Sequence[_Place]) -> Iterator[tuple[str, torch.Tensor]]:
        waiting: deque[tuple[list[_Place], list[torch.Tensor], Batch]] = deque()
        ahead = 0
        batches = _batches(places)
        following = next(batches, None)
        self._handles = {file: self._open(file) for file in dict.fromkeys(place.file for place in places)}
        with ReadAhead() as reader:
            while following or waiting:
                while following and (not waiting or (reader.threaded and ahead < AHEAD)):
                    tensors = [self._memory(place) for place in following]
                    pieces = [self._piece(*pair) for pair in zip(following, tensors, strict=True)]
                    waiting.append((following, tensors, reader.submit(pieces)))
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

    def _open(self, file: str) -> int:
        handle = os.open(file, os.O_RDONLY)
        self._stack.callback(os.close, handle)
        return handle

    def _piece(self, place: _Place, tensor: torch.Tensor) -> Piece:
        return Piece(self._handles[place.file], place.start, tensor, place.file, place.info.name)

    def _memory(self, place: _Place) -> torch.Tensor:
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


def _batches(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Tensors that are read by one request: small ones together."""
    batch: list[_Place] = []
    nbytes = 0
    for place in places:
        batch.append(place)
        nbytes += place.nbytes
        if nbytes >= BATCH:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
