"""Safetensors files, read tensor by tensor with plain reads.

Not memory-mapped: a mapped file that is truncated while it is read kills the process, and mapped
pages count as resident memory until the mapping goes. For the same reason headers are parsed here and
not by the safetensors library, which maps the file; the tests hold the two parsers against each other.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ..errors import SourceError
from ..memory import HostPool
from .base import Room, Span, Stream, TensorInfo
from .json_files import open_regular, strict_json
from .readahead import Piece, read_piece
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

LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer ones too."""

WRITE_AGAIN = "Write or copy the file again; reload when that is finished."

Stamp = tuple[int, int, int]
"""Size, modification time (ns) and inode of a file: what tells that it was rewritten."""


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
            self.stamps[file], places = _header(file)
            for place in places:
                if place.info.name in self._places:
                    other = self._places[place.info.name].file
                    raise SourceError(
                        f"{place.info.name} is in two files of one checkpoint, {other} and {file}. Take away "
                        "the file that belongs to another save, or add an index that names the right ones."
                    )
                self._places[place.info.name] = place

    @property
    def file_of(self) -> Mapping[str, str]:
        """Name -> the file that holds the tensor."""
        return {name: place.file for name, place in self._places.items()}

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

    def read_spans(self, name: str, spans: Sequence[Span], out: torch.Tensor) -> None:
        place = self._places[name]
        size = place.info.dtype.itemsize
        done = 0
        try:
            with contextlib.ExitStack() as stack:
                handle = self._open(place.file, stack)
                for start, stop in spans:
                    piece = Piece(
                        handle, place.start + start * size, out[done : done + stop - start], place.file, name
                    )
                    read_piece(piece)
                    done += stop - start
        except OSError as error:
            raise SourceError(f"{self.description} could not be read: {error}.") from error

    def unchanged(self) -> bool:
        try:
            return all(stamp_of(file) == stamp for file, stamp in self.stamps.items())
        except SourceError:
            return False

    def _open(self, file: str, stack: contextlib.ExitStack) -> int:
        """A descriptor of the very file whose header was parsed."""
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, handle)
        if _stamp(os.fstat(handle)) != self.stamps[file]:
            raise SourceError(_changed(file))
        return handle

    def _check_unchanged(self) -> None:
        for file, stamp in self.stamps.items():
            if stamp_of(file) != stamp:
                raise SourceError(_changed(file))


def _changed(file: str) -> str:
    return f"{file} changed while it was read. Reload when the trainer has finished writing."


def stamp_of(file: str) -> Stamp:
    """The stamp of the file that is there now."""
    try:
        return _stamp(Path(file).stat())
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read: {error}. {WRITE_AGAIN}") from error


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _header(file: str) -> tuple[Stamp, list[Place]]:
    """The file's stamp and where each tensor lies in it, in the order of the header."""
    try:
        with open_regular(file) as handle:
            stamp = _stamp(os.fstat(handle.fileno()))
            length = int.from_bytes(handle.read(8), "little")
            if length > min(LONGEST_HEADER, stamp[0] - 8):
                raise ValueError(f"its header claims {length:,} bytes and the file has {stamp[0]:,}")
            places = list(_parse(file, handle.read(length), 8 + length, stamp[0]))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} is not a whole safetensors file: {error}. {WRITE_AGAIN}") from error
    return stamp, places


def _parse(file: str, text: bytes, base: int, size: int) -> Iterator[Place]:
    """Tensors lie one behind the other from ``base`` to the end of the file (format description of the
    safetensors project). Raises ValueError, or SourceError where torch is what cannot follow.
    """
    header = strict_json(text)
    if text[:1] != b"{":
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if not (metadata is None or (type(metadata) is dict and all(type(v) is str for v in metadata.values()))):
        raise ValueError("its __metadata__ is not a table of strings")
    ends = 0
    for start, end, name in sorted((*_offsets(name, entry), name) for name, entry in header.items()):
        if start != ends:
            kind = "overlaps the tensor before it" if start < ends else "leaves a gap before it"
            raise ValueError(
                f"{name} begins at byte {start:,} of the data and {kind}, which ends at {ends:,}"
            )
        ends = end
    if base + ends != size:
        raise ValueError(f"its tensors end at byte {base + ends:,} and the file has {size:,}")
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield Place(_info(file, name, entry, end - start), file, base + start, end - start)


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends, counted from the end of the header."""
    if type(entry) is not dict:
        raise ValueError(f"{name} has no description")
    offsets = entry.get("data_offsets")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has the data_offsets {_brief(offsets)}")
    return offsets[0], offsets[1]


def _info(file: str, name: str, entry: dict[str, Any], nbytes: int) -> TensorInfo:
    shape, kind = entry.get("shape"), entry.get("dtype")
    if not _naturals(shape):
        raise ValueError(f"{name} has the shape {_brief(shape)}")
    dtype = _DTYPES.get(kind) if type(kind) is str else None
    if dtype is None:
        raise SourceError(
            f"{name} in {file} has the dtype {_brief(kind)}, which torch has no name for. Save it in another."
        )
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise ValueError(f"{name} has the shape {_brief(shape)} in {kind} and {nbytes:,} bytes")
    info = TensorInfo(name, tuple(shape), dtype)
    if not nbytes:
        try:
            info.meta()
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"{name} has the shape {_brief(shape)}, which no tensor has") from error
    return info


def _naturals(value: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of sizes (True and 1.0 are none)."""
    return type(value) is list and all(type(number) is int for number in value)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
