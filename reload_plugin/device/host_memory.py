"""Host memory: a pool reused from layer to layer and from reload to reload, and limits for the C heap.

Fresh pages cost more than the copy into them, and a heap that staging of many sizes passes through never
gets small again. Blocks lie in anonymous mappings, so that what is given back is really given back.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .gc_pause import collect_young
from .pinned import PinnedBlocks

SMALL = 1 << 20
"""Requests below this come from torch's allocator."""
ROOM = 64 << 20
"""Bytes that a pool reserves for a layer at least, and for the beginning of the next layer at most."""
KEPT = 2 * ROOM
"""Bytes of a pool that stay resident between reloads at most: faulting pages in again takes as long as
reading into them."""
IDLE = 256 << 20
"""Bytes that the C heap may keep unused between reloads: faulting pages in again takes longer than writing to
them."""
BLOCK = 96 << 20
"""Bytes from which on a block of the C heap is unmapped as soon as it is freed: two of that size are about
all that the heap may keep."""
SPARE = 16 << 20
"""Bytes of a pool beyond its largest layer at least: for layers that are not processed, and for small layers
in one read batch."""
_PAGE = 1 << 21
_OURS = 2
"""Reference count of a free block's storage object: the block's reference and the argument of the count."""
_STATM = "/proc/self/statm"


@dataclass
class MemoryGauge:
    """Bytes held now and at the peak."""

    held: int = 0
    peak: int = 0

    def add(self, nbytes: int) -> None:
        """Note that ``nbytes`` more are held (fewer, when negative)."""
        self.held += nbytes
        self.peak = max(self.peak, self.held)


class HostPool:
    """An arena of host memory that is cut into blocks and reused from its beginning.

    A block that was just processed is still in the processor's cache when the next layer is read into it.
    A block is free again when nothing refers to it. What does not fit into the arena gets a mapping of its
    own. Not thread-safe: each reload has one.
    """

    def __init__(self) -> None:
        self._arena: mmap.mmap | None = None
        self._size = ROOM + SPARE
        self._blocks: list[_Block] = []
        """In order of address. A free block of the right size is reused together with its storage object."""
        self.pinned = PinnedBlocks()
        """What the engine's sessions copy to and from a device through."""

    def reserve(self, nbytes: int) -> None:
        """Make the arena large enough for a layer of ``nbytes`` bytes and for a part of the next, whose
        beginning the same request brings along, unless it is in use. What nobody writes to takes no memory.
        """
        self._size = max(ROOM, nbytes) + max(SPARE, min(nbytes, ROOM))
        if self._arena is not None and len(self._arena) < self._size and not any(self._used()):
            self._arena, self._blocks = None, []

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """An uninitialised storage of at least ``nbytes`` bytes; free again when nothing refers to it."""
        if nbytes < SMALL:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._arena is None:
            self._arena = _mapped(-(-self._size // _PAGE) * _PAGE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._arena.madvise(mmap.MADV_HUGEPAGE)
        start = self._first_gap(size)
        if start + size > len(self._arena) and collect_young():
            start = self._first_gap(size)
        if start + size > len(self._arena):
            return torch.frombuffer(_mapped(size), dtype=torch.uint8).untyped_storage()
        for block in self._blocks:
            if block.start == start and block.end == start + size:
                return block.storage
        cut = torch.frombuffer(self._arena, dtype=torch.uint8, offset=start, count=size).untyped_storage()
        apart = [block for block in self._blocks if block.end <= start or block.start >= start + size]
        self._blocks = sorted([*apart, _Block(start, start + size, cut)], key=lambda block: block.start)
        return cut

    def settle(self) -> None:
        """Release unused memory beyond ``KEPT`` bytes to the system."""
        if self._arena is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        end = max((block.end for block in self._used()), default=0)
        first = max(KEPT, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE)
        if first < len(self._arena):
            self._arena.madvise(mmap.MADV_DONTNEED, first, len(self._arena) - first)

    def _used(self) -> Iterator[_Block]:
        return (block for block in self._blocks if block.used)

    def _first_gap(self, size: int) -> int:
        """Offset of the first free ``size`` bytes; the end of the last used block where there is no gap."""
        start = 0
        for block in self._used():
            if block.start - start >= size:
                break
            start = block.end
        return start


class _Block(NamedTuple):
    """A block of the arena: first byte, end, and the storage over it."""

    start: int
    end: int
    storage: torch.UntypedStorage

    @property
    def used(self) -> bool:
        """Whether a tensor uses this memory, or anything else refers to the storage object."""
        return torch._C._storage_Use_Count(self.storage._cdata) > 1 or sys.getrefcount(self.storage) > _OURS


def _mapped(size: int) -> mmap.mmap:
    """A new anonymous mapping, unmapped as soon as nothing refers to it.

    Huge pages are asked for only where memory stays. The host of a virtual machine takes back whole ones that
    are free, and to get them once more took from half to three times what small ones take in their place.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def view_of(address: int, nbytes: int) -> memoryview:
    """A writable view of memory at an address. Does not keep the memory alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def resident() -> int:
    """Resident bytes of this process; 0 where the system does not say (other than Linux)."""
    try:
        statm = os.open(_STATM, os.O_RDONLY)
    except OSError:
        return 0
    try:
        return int(os.read(statm, 200).split()[1]) * mmap.PAGESIZE
    finally:
        os.close(statm)


class Allocator(NamedTuple):
    """The C allocator's functions for releasing memory that it holds unused."""

    name: str
    unused: Callable[[], int] | None
    """Returns the bytes that it holds unused; None where it has no such function."""
    release: Callable[[int], object]
    """Releases at least so many unused bytes to the system, if it has them; glibc's releases all it can."""
    keep: Callable[[int, int], object] | None = None
    """Sets how many unused bytes it keeps, and the size from which on blocks are mapped separately; None
    where it decides by itself."""


@functools.cache
def allocator() -> Allocator | None:
    """The allocator of this process: tcmalloc, which vLLM preloads on a CPU where it has it, or glibc's."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "MallocExtension_ReleaseToSystem"):
        return _tcmalloc(library)
    if not hasattr(library, "malloc_trim"):
        return None
    keep = functools.partial(_keep_in_glibc, library)
    return Allocator("glibc", None, lambda _: library.malloc_trim(0), keep)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt`` (``malloc.h``)."""
_MMAP_THRESHOLD_MAX = 32 << 20
"""How far glibc raises the size from which blocks are mapped for themselves, and as far as ``mallopt(3)``
says that others may (64 bits); version 2.36 takes more."""
_HEAP_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def _keep_in_glibc(library: ctypes.CDLL, unused: int, block: int) -> None:
    """Have glibc map blocks for themselves only from ``block`` bytes on, which go back as soon as they are
    free, and give back the end of its heap only when that is larger than ``unused``.

    By itself it maps all from 32 MiB on and gives the end back at 64 MiB, so what one layer's processing is
    done with is got from the system once more for the next. Both are left alone where the environment sets
    one of them.
    """
    settings = " ".join(f"{name}={os.environ[name]}" for name in _HEAP_SETTINGS if name in os.environ)
    if any(word in settings.upper() for word in ("TRIM_THRESHOLD", "MMAP_THRESHOLD")):
        return
    if not library.mallopt(_M_MMAP_THRESHOLD, max(block, _MMAP_THRESHOLD_MAX)):
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)
    library.mallopt(_M_TRIM_THRESHOLD, unused)


def _tcmalloc(library: ctypes.CDLL) -> Allocator:
    """tcmalloc by its C interface (gperftools, ``malloc_extension_c.h``)."""
    ask, release = library.MallocExtension_GetNumericProperty, library.MallocExtension_ReleaseToSystem
    ask.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)]
    release.argtypes, release.restype = [ctypes.c_size_t], None

    def unused() -> int:
        found = ctypes.c_size_t(0)
        return int(found.value) if ask(b"tcmalloc.pageheap_free_bytes", ctypes.byref(found)) else 0

    return Allocator("tcmalloc", unused, release)


def keep_within(limit: int, nbytes: int) -> None:
    """Before allocating ``nbytes`` bytes from the C heap: release its unused memory if the process would have
    more than ``limit`` resident bytes otherwise.
    """
    found = allocator()
    if found is None:
        return
    at_hand = 0 if found.unused is None else found.unused()
    excess = resident() + max(0, nbytes - at_hand) - limit
    if excess > 0:
        collect_young()
        found.release(excess)


@dataclass
class Growth:
    """The smallest resident size of this process so far: what it has grown by since may be unused heap."""

    least: int | None = None
    """Resident bytes; None before the first reload."""

    def begin(self) -> int:
        """Note the start of a reload. Returns the resident bytes."""
        now = resident()
        found = allocator()
        if self.least is None and found is not None and found.keep is not None:
            found.keep(IDLE, BLOCK)
        self.least = now if self.least is None else min(self.least, now)
        return now

    def settle(self, found: Allocator) -> None:
        """After a reload: release unused heap if the process has grown by more than it may keep."""
        now = resident()
        if self.least is None or now - self.least > KEPT + IDLE:
            found.release(0)
            self.least = resident()


growth = Growth()
"""The one of this process."""


def settle_heap() -> None:
    """Between reloads: leave the C heap at most ``IDLE`` bytes that it does not use.

    One that does not tell how many those are has no more of them than the process has grown by; then what
    the pool keeps may be part of that.
    """
    found = allocator()
    if found is None:
        return
    if found.unused is None:
        growth.settle(found)
    elif (excess := found.unused() - IDLE) > 0:
        found.release(excess)
