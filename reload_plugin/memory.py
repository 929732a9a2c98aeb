"""Host memory that is used again from layer to layer and from reload to reload.

Fresh pages cost more than the copy into them, and a heap that staging of many sizes passes through never
gets small again. Blocks are anonymous mappings, so that what is given back is really given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SMALL = 1 << 20
"""Requests below this come from torch's allocator."""
KEPT = 32 << 20
"""Bytes of free blocks that are kept for the next request."""
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
    """Blocks of host memory. Not for several threads at once: a reload has one."""

    def __init__(self) -> None:
        self._free: list[torch.UntypedStorage] = []

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of at least ``nbytes`` bytes with any content."""
        if nbytes < SMALL:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
        fitting = [s for s in self._free if nbytes <= s.nbytes() <= 2 * nbytes + _PAGE]
        if fitting:
            best = min(fitting, key=lambda storage: storage.nbytes())
            self._free = [storage for storage in self._free if storage is not best]
            return best
        size = -(-nbytes // _PAGE) * _PAGE
        return torch.frombuffer(_private(size), dtype=torch.uint8).untyped_storage()

    def give(self, storage: torch.UntypedStorage) -> None:
        """Take a storage back, if nobody else holds it any more; else it goes when they let go."""
        if storage.nbytes() < SMALL or uses(storage) > 1:
            return
        self._free.append(storage)
        while sum(s.nbytes() for s in self._free) > KEPT:
            self._free.pop(0)

    def clear(self) -> None:
        """Give all free blocks back to the system."""
        self._free.clear()


def _private(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and storages refer to this memory, the caller's own reference included."""
    return int(torch._C._storage_Use_Count(storage._cdata))


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
