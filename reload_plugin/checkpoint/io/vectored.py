"""Vectored reads: one ``preadv`` call from a range of a file to many places in memory.

``os.preadv`` takes a Python object for each place, which costs more than the copy where tensors are small.
Here numpy computes the table of addresses in the layout of the C library (``struct iovec``), and the read
releases the interpreter's lock. For speed on a CPU only.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...device.host_memory import view_of

IOV_MAX = 512
"""Most places of one call (POSIX guarantees 16, Linux takes 1024)."""
Numbers = Sequence[int] | npt.NDArray[np.int64]
_ROW = 2 * np.dtype(np.uintp).itemsize


class IoVec(NamedTuple):
    """Rows of a table of places in memory (``struct iovec``). Owns the table, not the memory it points to."""

    table: npt.NDArray[np.uintp]
    """[parts, 2]: address and number of bytes of each (``struct iovec`` of POSIX)."""
    address: int
    """Of the first row."""
    length: int
    """How many rows."""

    def rows(self, first: int, last: int) -> IoVec:
        """The rows from ``first`` to before ``last``."""
        return IoVec(self.table, self.address + first * _ROW, last - first)

    def tolist(self) -> list[list[int]]:
        """Address and number of bytes of each."""
        first = (self.address - self.table.ctypes.data) // _ROW
        return self.table[first : first + self.length].tolist()  # type: ignore[no-any-return]


def iovec_of(addresses: Numbers, nbytes: Numbers) -> IoVec:
    """The table of ``nbytes`` bytes at each of the ``addresses``."""
    table = np.empty((len(addresses), 2), dtype=np.uintp)
    table[:, 0], table[:, 1] = addresses, nbytes
    return IoVec(table, table.ctypes.data, len(table))


def from_byte(parts: IoVec, first: int) -> IoVec:
    """The places without their first ``first`` bytes in total: what is left after a short read."""
    left: list[Sequence[int]] = []
    for address, nbytes in parts.tolist():
        if first < nbytes:
            left.append((address + first, nbytes - first))
        first = max(0, first - nbytes)
    return iovec_of(*zip(*left, strict=True))


def preadv(handle: int, parts: IoVec, position: int, flags: int = 0) -> int:
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
    while (got := call(handle, parts.address, parts.length, position, flags)) < 0:
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
