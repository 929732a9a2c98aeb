"""Safetensors files, read tensor by tensor with plain reads.

Not memory-mapped: a mapped file that is truncated while it is read kills the process, and mapped
pages count as resident memory until the mapping goes. Headers are parsed and checked by the
safetensors library.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import SourceError
from ..memory import HostPool, uses
from .base import TensorInfo

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
        self, order: Sequence[str] | None = None, pool: HostPool | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Peak memory: two tensors beyond what the caller still holds. Memory that the caller has let go
        of is used again for later tensors.
        """
        names = list(self._places) if order is None else order
        pool = HostPool() if pool is None else pool
        lent: list[torch.UntypedStorage] = []
        opened: dict[str, int] = {}
        try:
            for name in names:
                place = self._places[name]
                if place.file not in opened:
                    opened[place.file] = os.open(place.file, os.O_RDONLY)
                lent = _returned(lent, pool)
                storage = pool.take(place.nbytes)
                lent.append(storage)
                yield name, _read(opened[place.file], place, storage)
            self._check_unchanged()
        except OSError as error:
            raise SourceError(f"{self.description} could not be read: {error}.") from error
        finally:
            for handle in opened.values():
                os.close(handle)

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


def _returned(lent: list[torch.UntypedStorage], pool: HostPool) -> list[torch.UntypedStorage]:
    """Put what nobody refers to any more into the pool; the rest is still lent."""
    still = [storage for storage in lent if uses(storage) > 1]
    for storage in lent:
        if uses(storage) == 1:
            pool.give(storage)
    return still


def _read(handle: int, place: _Place, storage: torch.UntypedStorage) -> torch.Tensor:
    """Read one tensor into ``storage``, which it then shares.

    With one thread: OpenMP's workers spin between two kernels, and a second reader only fights with them.
    """
    meta = place.info.meta()
    tensor = torch.empty(0, dtype=place.info.dtype, device="cpu").set_(storage, 0, meta.shape, meta.stride())
    if not place.nbytes:
        return tensor
    whole = memoryview((ctypes.c_char * place.nbytes).from_address(tensor.data_ptr())).cast("B")
    done = 0
    while done < place.nbytes:
        got = os.preadv(handle, [whole[done:]], place.start + done)
        if got == 0:
            raise SourceError(
                f"{place.file} ends in the middle of {place.info.name}: it was cut while it was read."
            )
        done += got
    return tensor
