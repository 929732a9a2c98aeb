"""Stamps: a rewritten file is recognised by its size, modification time and inode."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import SourceError

Stamp = tuple[int, int, int]
"""Size, modification time (ns) and inode of a file."""

WRITE_AGAIN = "Write or copy the file again; reload when that is finished."
CHECK_STORAGE = "Check that the files are there and their storage works; then try again."


def stamp_of(file: str, handle: int | None = None) -> Stamp:
    """The stamp of the file at a path, or of the one that is open as ``handle``.

    Raises:
        SourceError: there is no such file.

    """
    try:
        return stamped(Path(file).stat() if handle is None else os.fstat(handle))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read: {error}. {WRITE_AGAIN}") from error


def stamped(found: os.stat_result) -> Stamp:
    """The stamp in a stat result."""
    return found.st_size, found.st_mtime_ns, found.st_ino


def open_same(
    files: Iterable[str], stamps: Mapping[str, Stamp], stack: contextlib.ExitStack
) -> dict[str, int]:
    """Open files and check that they are the ones that were stamped; ``stack`` closes the descriptors.

    Raises:
        OSError: a file is not there any more.
        SourceError: a file is another one than before.

    """
    handles = {}
    for file in files:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, handle)
        if stamped(os.fstat(handle)) != stamps[file]:
            raise SourceError(_changed(file))
        handles[file] = handle
    return handles


def check_same(stamps: Mapping[str, Stamp], handles: Mapping[str, int] | None = None) -> None:
    """Raise SourceError when a file has changed or is gone. Open ``handles`` go before paths."""
    for file, stamp in stamps.items():
        if stamp_of(file, None if handles is None else handles.get(file)) != stamp:
            raise SourceError(_changed(file))


def _changed(file: str) -> str:
    return f"{file} changed while it was read. Reload when the trainer has finished writing."
