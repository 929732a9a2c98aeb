"""The record, in a converted file's metadata, of what it was converted from; and whether that has changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import SourceError
from .formats.safetensors_files import read_header
from .io.json_files import open_regular
from .io.stamps import WRITE_AGAIN

KEY = "reload_plugin.source"
"""Key of the record in a file's ``__metadata__``."""
WRITTEN = "reload_plugin.written"
"""Key, beside the record, of what a conversion wrote into a folder: file name -> SHA-256; null: weights."""
_PIECE = 4 << 20
_TICKS = 1_000_000_000
"""Nanoseconds: two changes within this time may get the same time stamp from a file system."""


class FileStamp(BaseModel):
    """One file of the original. ``changed_ns`` is the status change time, which nobody can set back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    modified_ns: int
    changed_ns: int
    inode: int
    sha256: str


class Origin(BaseModel):
    """What a converted checkpoint was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """The original, absolute: a file or a folder."""
    folder: str
    """The folder that the names in ``files`` count from."""
    read_ns: int
    """Unix time when the original had been read."""
    files: dict[str, FileStamp]


def origin_of_files(path: Path, files: Iterable[Path]) -> Origin:
    """Describe an original before it is converted. Reads every byte of it once, for the digest.

    SHA-256: processors have instructions for it, hashlib is there anyway, and nobody can make another file
    of the same digest.

    Raises:
        SourceError: a file cannot be read.

    """
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    stamps = {os.path.relpath(file.absolute(), folder): _stamp(file) for file in files}
    return Origin(path=str(path), folder=str(folder), read_ns=time.time_ns(), files=stamps)


def origin_of(converted: str | Path) -> Origin | None:
    """The record in a converted file, or in the first file of a converted folder; None without one.

    Raises:
        SourceError: the file cannot be read, or its record is damaged.

    """
    file, metadata = _recorded(Path(converted))
    return _origin_in(file, metadata)


def written_files(folder: Path) -> dict[str, str | None]:
    """File name -> SHA-256 of what a conversion wrote into a folder; None for weights and their index.

    Raises:
        SourceError: the folder cannot be read, its record is damaged, or no conversion wrote it.

    """
    file, metadata = _recorded(folder)
    if _origin_in(file, metadata) is None:
        raise SourceError(_not_converted(folder))
    try:
        found = json.loads(metadata.get(WRITTEN, "{}"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise SourceError(
            f"{file} says in a damaged way what its conversion wrote: {error}. "
            "Convert the original again to another place."
        ) from error
    return found | {Path(file).name: None}


def _origin_in(file: str, metadata: Mapping[str, str]) -> Origin | None:
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        return Origin.model_validate_json(text)
    except ValidationError as error:
        raise SourceError(
            f"{file} says in a damaged way what it was converted from. Convert the original again."
        ) from error


def why_stale(converted: str | Path, original: str | Path | None = None) -> str | None:
    """How the original differs from what was converted, in words; None where it does not.

    Size first; equal times of modification and change then settle it, else the digest does. An original
    that is gone has left the converted one as all there is, which is not stale.

    Args:
        converted: what ``convert`` wrote.
        original: where the original is now, if it moved.

    Raises:
        SourceError: ``converted`` cannot be read, or holds no record of an original.

    """
    origin = origin_of(converted)
    if origin is None:
        raise SourceError(_not_converted(converted))
    return _why_stale(origin, original)


def _not_converted(path: str | Path) -> str:
    return f"{path} does not say what it was converted from. Convert the original with reload_plugin."


def _why_stale(origin: Origin, original: str | Path | None) -> str | None:
    folder = Path(origin.folder) if original is None else Path(original)
    folder = folder.parent if folder.is_file() else folder
    if not folder.exists() or (original is None and not Path(origin.path).exists()):
        return None
    for name, stamp in origin.files.items():
        if (reason := _difference(folder / name, stamp, origin.read_ns)) is not None:
            return reason
    return None


def refuse_stale(files: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse converted files whose original lies beside them and is not what they were converted from.

    Args:
        files: safetensors file -> the ``__metadata__`` of its header.

    Raises:
        SourceError: it names the original and the next step.

    """
    for file, metadata in files.items():
        origin = _origin_in(file, metadata)
        if origin is None or Path(origin.folder) != Path(file).absolute().parent:
            continue
        if (reason := _why_stale(origin, None)) is not None:
            raise SourceError(
                f"{file} was converted from {origin.path}, and {reason}: it does not win over a newer "
                f"original. Convert {origin.path} again, or take {Path(file).name} away."
            )


def _difference(file: Path, then: FileStamp, read_ns: int) -> str | None:
    try:
        found = file.stat()
    except OSError:
        return f"{file.name} is gone"
    if found.st_size != then.size:
        return f"{file.name} has {found.st_size:,} bytes and had {then.size:,}"
    times = (found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    settled = then.changed_ns < read_ns - _TICKS
    if settled and times == (then.modified_ns, then.changed_ns, then.inode):
        return None
    return None if file_digest(file) == then.sha256 else f"{file.name} has other bytes than it had"


def _stamp(file: Path) -> FileStamp:
    try:
        found = file.stat()
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error}. {WRITE_AGAIN}") from error
    return FileStamp(
        size=found.st_size,
        modified_ns=found.st_mtime_ns,
        changed_ns=found.st_ctime_ns,
        inode=found.st_ino,
        sha256=file_digest(file),
    )


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        SourceError: the file cannot be read.

    """
    total = hashlib.sha256()
    try:
        with open_regular(file) as handle:
            while piece := handle.read(_PIECE):
                total.update(piece)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error}. {WRITE_AGAIN}") from error
    return total.hexdigest()


def _recorded(converted: Path) -> tuple[str, Mapping[str, str]]:
    """The file that holds a conversion's record, and its metadata; the first file where none does."""
    files = sorted(converted.glob("*.safetensors")) if converted.is_dir() else [converted]
    if not files:
        raise SourceError(f"{converted} holds no safetensors files. Give what convert wrote.")
    first: tuple[str, Mapping[str, str]] | None = None
    for file in map(str, files):
        found = file, read_header(file).metadata
        if KEY in found[1]:
            return found
        first = first or found
    assert first is not None, "there is a file"
    return first
