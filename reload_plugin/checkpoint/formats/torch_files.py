"""Files of torch.save: their contents, and where each tensor's bytes lie; no weights are read.

Since torch 1.6 such a file is a zip archive with ``data.pkl`` and one record a storage, none compressed
(``torch/serialization.py``); before that, pickles one behind the other and then the storages. Neither is
mapped into memory: a mapped file that is truncated while it is read kills the process.
"""

from __future__ import annotations

import functools
import io
import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import SourceError
from ..io.json_files import open_regular
from ..io.locations import StoredBox
from ..io.stamps import WRITE_AGAIN, Stamp, stamped
from ..pickle.unpickling import unpickle
from ..pickle.values import Storage, StoredTensor

_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a file of torch before 1.6."""
_LOCAL_HEADER = 30
"""Bytes of a record's header in a zip archive, before its name (APPNOTE.TXT of PKWARE, 4.3.7)."""
LONGEST_PICKLE = 1 << 30
"""Bytes; a listing of a million tensors has a third of that."""


@dataclass(frozen=True)
class TorchFile:
    """What a file of torch.save holds. Tensors in ``tree`` are StoredTensor."""

    file: str
    stamp: Stamp
    tree: Any
    records: Mapping[str, tuple[int, int]]
    """Storage key -> first byte in the file, bytes."""

    def part(self, tensor: StoredTensor, offsets: tuple[int, ...] | None = None) -> StoredBox:
        """Where a tensor lies; ``offsets`` when it is a box of a larger one.

        Raises:
            ValueError: the file does not hold its bytes.

        """
        start, nbytes = self.records.get(tensor.storage.key, (0, -1))
        if nbytes < tensor.storage.start + tensor.storage.nbytes and 0 not in tensor.shape:
            raise ValueError(f"the bytes of storage {tensor.storage.key} are not all there")
        return StoredBox(
            offsets or (0,) * len(tensor.shape),
            tensor.shape,
            self.file,
            start + tensor.start,
            tensor.strides,
        )


Unpickle = Callable[..., Any]


def read_torch_file(file: str | Path, extra: Collection[str] = (), *, exact: bool = False) -> TorchFile:
    """List a file of torch.save. Nothing in it is run, and no weight is read.

    Args:
        file: path of the file.
        extra: names that its pickle may use; see ``unpickle``.
        exact: whether what is no weight has to be told apart too; see ``unpickle``.

    Raises:
        SourceError: it is missing, truncated or something else, or its pickle names what it may not.

    """
    try:
        with open_regular(file) as handle:
            stamp = stamped(os.fstat(handle.fileno()))
            tree, records = _contents(handle, stamp[0], functools.partial(unpickle, extra=extra, exact=exact))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{file} cannot be read as a file of torch.save: {error}. {_next(error)}"
        ) from error
    return TorchFile(str(file), stamp, tree, records)


def read_chunk(handle: int, file: str, start: int, nbytes: int) -> TorchFile:
    """A file of torch.save that lies inside another file, as torch.distributed.checkpoint writes them.

    Raises:
        ValueError: it is damaged.

    """
    tree, records = _archive(io.BufferedReader(_Window(handle, start, nbytes)), start, unpickle)
    return TorchFile(file, (0, 0, 0), tree, records)


def _next(error: Exception) -> str:
    if "could run code" in str(error):
        return (
            "If you trust whoever wrote it, load it with torch.load(..., weights_only=False) in a process of "
            "its own and save its weights alone, as safetensors."
        )
    return WRITE_AGAIN


def _contents(handle: BinaryIO, size: int, read: Unpickle) -> tuple[Any, Mapping[str, tuple[int, int]]]:
    head = handle.read(4)
    handle.seek(0)
    if head == b"PK\x03\x04":
        return _archive(handle, 0, read)
    if head[:2] == b"\x80\x02":
        return _legacy(handle, size, read)
    raise ValueError("it is neither a zip archive nor a pickle")


# -- since torch 1.6 ------------------------------------------------------------------------------


def _archive(handle: BinaryIO, base: int, read: Unpickle) -> tuple[Any, Mapping[str, tuple[int, int]]]:
    """``base`` is where the archive begins in its file, ``read`` what its pickle is given to."""
    try:
        with zipfile.ZipFile(handle) as archive:
            entries, end = archive.infolist(), archive.start_dir
    except Exception as error:  # a damaged archive leads to errors of many kinds
        raise ValueError(f"it is not a whole zip archive ({type(error).__name__}: {error})") from error
    found = {entry.filename: entry for entry in entries}
    if len(found) != len(entries):
        raise ValueError("its archive has a record twice")
    roots = [name.partition("/")[0] for name in found if name.partition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise ValueError("its archive has no data.pkl, as files of torch.save do")
    root = roots[0]
    if f"{root}/constants.pkl" in found:
        raise ValueError("it is a TorchScript program; save the state dict of the model instead")
    located = {name: _record(handle, entry, end) for name, entry in found.items()}
    order = f"{root}/byteorder"
    if order in located and _bytes(handle, *located[order]) != b"little":
        raise ValueError("it was written on a machine of another byte order; save it again on this kind")
    pickled = _bytes(handle, *located[f"{root}/data.pkl"])
    tree = read(pickled)
    prefix = f"{root}/data/"
    records = {
        name.removeprefix(prefix): (base + start, nbytes)
        for name, (start, nbytes) in located.items()
        if name.startswith(prefix)
    }
    return tree, records


def _record(handle: BinaryIO, entry: zipfile.ZipInfo, end: int) -> tuple[int, int]:
    """First byte and length of a record in the archive."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError(f"its record {entry.filename} is compressed or encrypted")
    handle.seek(entry.header_offset)
    head = handle.read(_LOCAL_HEADER)
    if len(head) != _LOCAL_HEADER or head[:4] != b"PK\x03\x04":
        raise ValueError(f"its record {entry.filename} has no header")
    name, more = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
    start = entry.header_offset + _LOCAL_HEADER + name + more
    if entry.compress_size != entry.file_size or start + entry.file_size > end:
        raise ValueError(f"its record {entry.filename} is not whole")
    return start, entry.file_size


def _bytes(handle: BinaryIO, start: int, nbytes: int) -> bytes:
    if nbytes > LONGEST_PICKLE:
        raise ValueError(f"its pickle has {nbytes:,} bytes")
    handle.seek(start)
    return handle.read(nbytes)


class _Window(io.RawIOBase):
    """Bytes of an open file as a file of its own, which does not move the other's position."""

    def __init__(self, handle: int, start: int, nbytes: int) -> None:
        self._handle, self._start, self._nbytes, self._at = handle, start, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if origin + offset < 0:
            raise OSError("before the beginning")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        destinations = memoryview(buffer).cast("B")[: max(0, self._nbytes - self._at)]
        got = os.preadv(self._handle, [destinations], self._start + self._at) if len(destinations) else 0
        self._at += got
        return got


# -- before torch 1.6 -----------------------------------------------------------------------------


def _legacy(handle: BinaryIO, size: int, read: Unpickle) -> tuple[Any, Mapping[str, tuple[int, int]]]:
    """Pickles of a magic number, a version, the machine, the objects and the storages' keys; then the
    storages, each an int64 of its elements and their bytes.
    """
    if unpickle(handle, plain=False, tensors=False) != _MAGIC:
        raise ValueError("it is a pickle, and not one of torch.save")
    unpickle(handle, plain=False, tensors=False)
    machine = unpickle(handle, plain=False, tensors=False)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise ValueError("it was written on a machine of another byte order; save it again on this kind")
    storages: dict[str, Storage] = {}
    tree = read(handle, storages=storages)
    keys = unpickle(handle, plain=False, tensors=False)
    if type(keys) is not list or len(set(map(str, keys))) != len(keys):
        raise ValueError("its list of storages is damaged")
    records = {}
    at = handle.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise ValueError("it holds a storage that nothing refers to")
        handle.seek(at)
        numel = int.from_bytes(handle.read(8), "little")
        if numel * storage.itemsize != storage.nbytes or at + 8 + storage.nbytes > size:
            raise ValueError(f"its storage {key} is not whole")
        records[key] = (at + 8, storage.nbytes)
        at += 8 + storage.nbytes
    return tree, records


def is_torch_file(file: str | Path) -> bool:
    """Whether a file begins like one of torch.save."""
    try:
        with open_regular(file) as handle:
            return handle.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))
    except (OSError, ValueError):
        return False
