"""Safetensors files, read tensor by tensor with plain reads.

Not memory-mapped: a mapped file that is truncated while it is read kills the process, and mapped
pages count as resident memory until the mapping goes. For the same reason headers are parsed here and
not by the safetensors library, which maps the file; the tests hold the two parsers against each other.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
import xxhash

from ...errors import SourceError
from ...plan.source import Span, TensorInfo, tensor_info
from ...record.tensor_layout import shared
from ..dtypes import METADATA_KEY, SAFETENSORS_DTYPES
from ..file_source import FileSource
from ..io.json_files import open_regular, strict_items
from ..io.locations import ContiguousLocation
from ..io.read_batches import ReadBatch, read_batches_of
from ..io.readahead import Piece, read_piece
from ..io.stamps import CHECK_STORAGE, WRITE_AGAIN, Stamp, stamped

LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer ones too."""


class SafetensorsSource(FileSource):
    """One or many safetensors files as one checkpoint.

    Raises:
        SourceError: a file is missing, truncated or not safetensors, or two files hold one name.

    """

    def __init__(self, files: Sequence[str], description: str) -> None:
        super().__init__(description, "safetensors")
        self.metadata: dict[str, Mapping[str, str]] = {}
        """File -> the ``__metadata__`` of its header."""
        names = Counter(Path(path).name for path in files)
        layouts = []
        for path in files:
            file = Path(path).name if names[Path(path).name] == 1 else path
            header = read_header(path)
            self.stamps[path] = header.stamp
            self.metadata[path] = header.layout.metadata
            self.paths[file] = path
            places = header.layout.locations_in(file)
            if both := self._locations.keys() & places.keys():
                name = min(both)
                raise SourceError(
                    f"{name} is in two files of one checkpoint, {self.file_of[name]} and {path}. Take away "
                    "the file that belongs to another save, or add an index that names the right ones."
                )
            self._locations.update(places)
            layouts.append(header.layout)
        self._layouts = tuple(layouts)

    @property
    def locations(self) -> Sequence[ContiguousLocation]:
        """Where each tensor lies, in stored order."""
        return [place for place in self._locations.values() if isinstance(place, ContiguousLocation)]

    @property
    def file_of(self) -> Mapping[str, str]:
        """Name -> the path of the file that holds the tensor."""
        return {name: self.paths[place.files[0]] for name, place in self._locations.items()}

    def _batches_of(self, order: Sequence[str] | None) -> Sequence[ReadBatch]:
        if not isinstance(order, tuple):
            return ()  # nobody asks for the same again
        return _cached_read_batches(order, self._layouts, tuple(self.paths))

    def read_spans(self, name: str, spans: Sequence[Span], out: torch.Tensor) -> None:
        place = self._locations[name]
        assert isinstance(place, ContiguousLocation), "every tensor of a safetensors file lies in one piece"
        size = place.info.dtype.itemsize
        done = 0
        try:
            with contextlib.ExitStack() as stack:
                path = self.paths[place.file]
                handle = self._opened([path], stack)[path]
                for start, stop in spans:
                    memory = out[done : done + stop - start]
                    read_piece(Piece(handle, place.start + start * size, memory, path, name))
                    done += stop - start
        except OSError as error:
            raise SourceError(f"{self.description} could not be read: {error}. {CHECK_STORAGE}") from error


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data."""

    stamp: Stamp
    layout: Layout

    @property
    def metadata(self) -> Mapping[str, str]:
        """What its ``__metadata__`` says."""
        return self.layout.metadata


def read_header(file: str) -> Header:
    """The header of a safetensors file.

    Raises:
        SourceError: the file is missing, truncated or something else.

    """
    try:
        with open_regular(file) as handle:
            stamp = stamped(os.fstat(handle.fileno()))
            length = int.from_bytes(handle.read(8), "little")
            if length > min(LONGEST_HEADER, stamp[0] - 8):
                raise ValueError(f"its header claims {length:,} bytes and the file has {stamp[0]:,}")
            layout = _layout_of(handle.read(length))
    except UnknownDtypeError as error:
        name, kind = error.args
        raise SourceError(
            f"{name} in {file} has the dtype {kind}, which torch has no name for. Save it in another."
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} is not a whole safetensors file: {error}. {WRITE_AGAIN}") from error
    if 8 + length + layout.end != stamp[0]:
        raise SourceError(
            f"{file} is not a whole safetensors file: its tensors end at byte {8 + length + layout.end:,} "
            f"and the file has {stamp[0]:,}. {WRITE_AGAIN}"
        )
    return Header(stamp, layout)


class UnknownDtypeError(Exception):
    """A tensor whose dtype torch has no name for: its name and its dtype."""


@dataclass(eq=False)
class Layout:
    """What the text of a header says, whatever file it is in."""

    metadata: Mapping[str, str]
    infos: Sequence[TensorInfo]
    starts: array[int]
    """First byte of each in the file."""
    sizes: array[int]
    """Number of bytes of each."""
    end: int
    """Bytes of all tensors."""
    _last_locations: tuple[str, Mapping[str, ContiguousLocation]] = ("", MappingProxyType({}))

    def locations_in(self, file: str) -> Mapping[str, ContiguousLocation]:
        """Name -> where the tensor lies, in the order of the header; the same objects for the same file."""
        # One read and one write of the attribute: another thread may replace it at any time.
        last_file, places = self._last_locations
        if last_file != file:
            tensors = zip(self.infos, self.starts, self.sizes, strict=True)
            places = {info.name: ContiguousLocation(info, file, *lies) for info, *lies in tensors}
            self._last_locations = file, places
        return places


REMEMBERED = 8
"""Headers that need not be parsed again: a trainer writes the same at every step."""
LONGEST_REMEMBERED = 8 << 20
"""Bytes of a header from which on it is parsed again all the same."""
_layouts_lock = threading.Lock()
_layouts: OrderedDict[bytes, Layout] = OrderedDict()
"""Digest of a header's text -> what it says. The text itself takes as much memory as the rest of a plan."""


def _layout_of(text: bytes) -> Layout:
    """What a header says, from the last few if it is one of them."""
    if len(text) > LONGEST_REMEMBERED:
        return _parse(text)
    digest = xxhash.xxh3_128_digest(text)
    with _layouts_lock:
        layout = _layouts.pop(digest, None)
    layout = layout or _parse(text)
    with _layouts_lock:
        _layouts[digest] = layout
        while len(_layouts) > REMEMBERED:
            _layouts.popitem(last=False)
    return layout


@functools.lru_cache(maxsize=2)
def _cached_read_batches(
    order: tuple[str, ...], layouts: tuple[Layout, ...], files: tuple[str, ...]
) -> Sequence[ReadBatch]:
    """The tensors of some files in read batches; the same for every save of the same layout.

    All engines and threads of the process share them: whatever a batch keeps has to belong to its key.
    """
    places: dict[str, ContiguousLocation] = {}
    for layout, file in zip(layouts, files, strict=True):
        places.update(layout.locations_in(file))
    return tuple(read_batches_of(places[name] for name in order))


def _parse(text: bytes) -> Layout:
    """Tensors lie one behind the other (format description of the safetensors project).

    Raises:
        ValueError: the header says something else.
        UnknownDtypeError: torch is what cannot follow.

    """
    metadata: Mapping[str, str] = {}
    names: set[str] = set()
    infos: list[TensorInfo] = []
    starts, sizes = array("q"), array("q")
    base, problem = 8 + len(text), None
    for name, entry in strict_items(text):
        if name in names:
            raise ValueError(f"it has {name!r} twice")
        names.add(name)
        try:
            if name == METADATA_KEY:
                metadata = _strings(entry)
                continue
            info, start, nbytes = _tensor(name, entry)
        except (ValueError, UnknownDtypeError) as error:
            problem = problem or error  # what does not parse at all, further on, is more to the point
            continue
        infos.append(info)
        starts.append(base + start)
        sizes.append(nbytes)
    if problem is not None:
        raise problem
    if text[:1] != b"{":
        raise ValueError("its header is not a JSON object")
    return Layout(metadata, infos, starts, sizes, _end_of(infos, starts, sizes, base) - base)


def _strings(entry: Any) -> dict[str, str]:
    if entry is None:
        return {}
    if not (type(entry) is dict and all(type(value) is str for value in entry.values())):
        raise ValueError(f"its {METADATA_KEY} is not a table of strings")
    return entry


def _end_of(infos: Sequence[TensorInfo], starts: array[int], sizes: array[int], base: int) -> int:
    """Where the last tensor ends, if each begins where the one before it ends."""
    end = base
    for index in sorted(range(len(infos)), key=lambda index: (starts[index], sizes[index])):
        if starts[index] != end:
            kind = "overlaps the tensor before it" if starts[index] < end else "leaves a gap before it"
            raise ValueError(
                f"{infos[index].name} begins at byte {starts[index] - base:,} of the data and {kind}, which "
                f"ends at {end - base:,}"
            )
        end += sizes[index]
    return end


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """A tensor, its first byte counted from the end of the header, and how many it has."""
    if type(entry) is not dict:
        raise ValueError(f"{name} has no description")
    offsets, shape, kind = entry.get("data_offsets"), entry.get("shape"), entry.get("dtype")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has the data_offsets {_brief(offsets)}")
    if not _naturals(shape):
        raise ValueError(f"{name} has the shape {_brief(shape)}")
    dtype = SAFETENSORS_DTYPES.get(kind) if type(kind) is str else None
    if dtype is None:
        raise UnknownDtypeError(name, _brief(kind))
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise ValueError(f"{name} has the shape {_brief(shape)} in {kind} and {nbytes:,} bytes")
    named = TensorInfo if nbytes else tensor_info  # bytes that are there vouch for the shape
    return named(name, shared(tuple(shape)), dtype), offsets[0], nbytes


def _naturals(value: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of sizes (True and 1.0 are none)."""
    return type(value) is list and all(type(number) is int for number in value)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
