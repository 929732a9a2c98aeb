"""Safetensors files, read tensor by tensor with plain reads.

Not memory-mapped: a mapped file that is truncated while it is read kills the process, and mapped
pages count as resident memory until the mapping goes. Headers are parsed and checked by the
safetensors library.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import SourceError
from ..memory import HostPool
from .base import Room, Stream, TensorInfo
from .reading import Place, read_places

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


class SafetensorsSource:
    """One or many safetensors files as one checkpoint.

    Raises:
        SourceError: a file is missing, truncated or not safetensors, or two files hold one name.

    """

    def __init__(self, files: Sequence[str], description: str) -> None:
        self.description = description
        self._places: dict[str, Place] = {}
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
            try:
                handles = {file: self._open(file, stack) for file in dict.fromkeys(p.file for p in places)}
                yield from read_places(places, handles, HostPool() if pool is None else pool, room)
                self._check_unchanged()
            except OSError as error:
                raise SourceError(f"{self.description} could not be read: {error}.") from error

    def unchanged(self) -> bool:
        try:
            return all(stamp_of(file) == stamp for file, stamp in self.stamps.items())
        except SourceError:
            return False

    def _open(self, file: str, stack: contextlib.ExitStack) -> int:
        handle = os.open(file, os.O_RDONLY)
        stack.callback(os.close, handle)
        return handle

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


def _header(file: str) -> list[Place]:
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


def _place(file: str, name: str, entry: dict[str, Any], base: int) -> Place:
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise SourceError(f"{name} in {file} has the dtype {entry['dtype']}, which torch has no name for.")
    start, end = entry["data_offsets"]
    info = TensorInfo(name, tuple(entry["shape"]), dtype)
    try:
        info.meta()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise SourceError(f"{name} in {file} has the shape {entry['shape']}, which no tensor has.") from error
    return Place(info, file, base + int(start), int(end) - int(start))
