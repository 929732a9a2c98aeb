"""Host memory that is used again from layer to layer and from reload to reload.

Fresh pages cost more than the copy into them, and a heap that staging of many sizes passes through never
gets small again. Blocks lie in anonymous mappings, so that what is given back is really given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SMALL = 1 << 20
"""Requests below this come from torch's allocator."""
KEPT = 64 << 20
"""Bytes of a pool that stay with the process between reloads, at most."""
SPARE = 16 << 20
"""Bytes of a pool beyond its largest layer: for layers that are not processed, and the next weights."""
_PAGE = 1 << 21
_STATM = Path("/proc/self/statm")


@dataclass
class Gauge:
    """Bytes held now and at the peak."""

    held: int = 0
    peak: int = 0

    def add(self, nbytes: int) -> None:
        """Note that ``nbytes`` more are held (fewer, when negative)."""
        self.held += nbytes
        self.peak = max(self.peak, self.held)


class HostPool:
    """Blocks of host memory, cut from one stretch that is used again from its beginning.

    A block that was just processed is still in the processor's cache when the next layer is read into it. Blocks
    come back by themselves when the last tensor over them goes. What the stretch has no place for is mapped for
    itself. Not for several threads at once: a reload has one.
    """

    def __init__(self) -> None:
        self._stretch: mmap.mmap | None = None
        self._size = KEPT + SPARE
        self._free: list[tuple[int, int]] = []
        """Start and end of each gap, in order."""
        self._back: deque[tuple[int, int]] = deque()
        """Blocks that came back, in whatever thread, since the gaps were last joined."""

    def reserve(self, nbytes: int) -> None:
        """Make the stretch large enough for a layer of ``nbytes`` bytes, as soon as nothing is in use."""
        self._size = max(KEPT, nbytes) + SPARE
        self._join()
        if self._stretch is not None and len(self._stretch) < self._size and self._idle():
            self._stretch = None

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of at least ``nbytes`` bytes with any content."""
        if nbytes < SMALL:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._stretch is None:
            self._stretch = _private(self._size)
            self._free = [(0, len(self._stretch))]
        self._join()
        for number, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[number : number + 1] = [(start + size, end)] if end - start > size else []
                block = (ctypes.c_char * size).from_buffer(self._stretch, start)
                weakref.finalize(block, self._back.append, (start, start + size)).atexit = False
                return torch.frombuffer(block, dtype=torch.uint8).untyped_storage()
        return torch.frombuffer(_private(size), dtype=torch.uint8).untyped_storage()

    def settle(self) -> None:
        """Give back to the system what is not worth keeping for the next reload."""
        self._join()
        for start, end in self._free:
            first = max(start, KEPT)
            if self._stretch is not None and end > first and hasattr(mmap, "MADV_DONTNEED"):
                self._stretch.madvise(mmap.MADV_DONTNEED, first, end - first)

    def _idle(self) -> bool:
        return self._stretch is None or self._free == [(0, len(self._stretch))]

    def _join(self) -> None:
        if not self._back:
            return
        gaps = sorted([*self._free, *(self._back.popleft() for _ in range(len(self._back)))])
        self._free = gaps[:1]
        for start, end in gaps[1:]:
            if start == self._free[-1][1]:
                self._free[-1] = (self._free[-1][0], end)
            else:
                self._free.append((start, end))


def _private(size: int) -> mmap.mmap:
    size = -(-size // _PAGE) * _PAGE
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def resident() -> int:
    """Bytes of this process in memory, as far as the system tells (Linux)."""
    try:
        with _STATM.open("rb", buffering=0) as statm:
            return int(statm.read(200).split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU what the system and its cgroup leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_cgroup_left()]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10)
    return min(left for left in (*found, 1 << 62) if left is not None)


def _cgroup_left() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        return max(0, limit - used)
    return None


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Give freed pages of the C heap back to the system, where the C library can (glibc)."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
