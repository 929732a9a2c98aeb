"""Reading one range of a file to many places in memory with one call.

Python's own ``os.preadv`` wants an object for each place, which costs more than the copy where tensors are
small. Here the places are a table of addresses that numpy computes, in the very layout that the C library
takes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..memory import view_of

Parts = npt.NDArray[np.uintp]
"""Places in memory: [parts, 2], address and bytes of each (``struct iovec`` of POSIX). Owns nothing."""

IOV_MAX = 512
"""Parts of one call (POSIX promises 16, Linux takes 1024)."""


def parts_at(addresses: npt.ArrayLike, nbytes: npt.ArrayLike) -> Parts:
    """A table of ``nbytes`` bytes at each of the ``addresses``."""
    return np.array((addresses, nbytes), dtype=np.uintp).T.copy()


def cut(parts: Parts, first: int, last: int) -> Parts:
    """The places of the bytes from ``first`` to before ``last`` of all that ``parts`` have together."""
    ends = np.cumsum(parts[:, 1], dtype=np.int64)
    return _cut(parts, ends, first, last)


def in_pieces(parts: Parts, nbytes: int) -> list[tuple[int, Parts]]:
    """The places in pieces of ``nbytes`` bytes, the last of what is left: (first byte, places) of each."""
    ends = np.cumsum(parts[:, 1], dtype=np.int64)
    total = int(ends[-1])
    return [
        (first, _cut(parts, ends, first, min(first + nbytes, total))) for first in range(0, total, nbytes)
    ]


def _cut(parts: Parts, ends: npt.NDArray[np.int64], first: int, last: int) -> Parts:
    begin, end = (int(at) for at in np.searchsorted(ends, (first + 1, last)))
    found = parts[begin : end + 1].copy()
    before = first - int(ends[begin]) + int(parts[begin, 1])
    found[0, 0] += before
    found[0, 1] -= before
    found[-1, 1] -= int(ends[end]) - last
    return found


def preadv(handle: int, parts: Parts, position: int, flags: int = 0) -> int:
    """Read from ``position`` of a file on into ``parts``, at most ``IOV_MAX`` of them, as ``os.preadv`` does.

    The memory must be there, and stay, until this returns; other threads of Python's run meanwhile.

    Returns:
        How many bytes were read; fewer than there is room for at the end of the file, or if the system
        likes.

    Raises:
        OSError: as ``os.preadv``.

    """
    call = _preadv2()
    if call is None:
        memory = [view_of(address, nbytes) for address, nbytes in parts.tolist()]
        return os.preadv(handle, memory, position, flags)
    table = parts.ctypes.data
    while (got := call(handle, table, len(parts), position, flags)) < 0:
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return int(got)


@functools.cache
def _preadv2() -> Callable[..., Any] | None:
    """The C library's ``preadv2``; None where it has none that is known to take offsets of 64 bits."""
    if ctypes.sizeof(ctypes.c_long) != ctypes.sizeof(ctypes.c_int64):
        return None
    found: Any = getattr(ctypes.CDLL(None, use_errno=True), "preadv2", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
        found.restype = ctypes.c_ssize_t
    return found  # type: ignore[no-any-return]
