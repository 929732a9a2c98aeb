"""The pool that staging comes from: blocks of one stretch, used again, and never handed out twice."""

import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reload_plugin.device import host_memory as memory
from reload_plugin.device.host_memory import HostPool

MIB = 1 << 20


def whole(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def test_blocks_never_overlap_while_something_refers_to_them() -> None:
    """A thousand requests in a wild order; each block keeps what was written to it as long as it is held."""
    chance, pool = random.Random(4), HostPool()
    held: list[tuple[int, object]] = []
    for number in range(1000):
        storage = pool.take(chance.choice((1, 2, 3, 5, 9)) * MIB + chance.randrange(5000))
        whole(storage)[:: mmap.PAGESIZE].fill_(number % 251)
        # Some holders keep a tensor, some the storage itself, some a view of a few bytes.
        kept = chance.choice((whole(storage), storage, whole(storage)[4096:4106]))
        held.append((number % 251, kept))
        del storage, kept
        while len(held) > chance.randrange(1, 12):
            held.pop(chance.randrange(len(held)))
        for value, found in held:
            bytes_of = whole(found) if isinstance(found, torch.UntypedStorage) else found
            assert set(bytes_of[:: mmap.PAGESIZE].tolist()) == {value}


def test_a_block_without_references_is_used_again() -> None:
    pool = HostPool()
    first = pool.take(8 * MIB).data_ptr()
    assert pool.take(2 * MIB).data_ptr() == first
    tensor = whole(pool.take(8 * MIB))
    assert pool.take(8 * MIB).data_ptr() == first + 8 * MIB
    del tensor
    assert pool.take(3 * MIB).data_ptr() == first


def test_what_does_not_fit_is_mapped_for_itself() -> None:
    pool = HostPool()
    fitting = whole(pool.take(2 * MIB))
    large = whole(pool.take(memory.ROOM + memory.SPARE))
    assert large.numel() >= memory.ROOM + memory.SPARE
    assert not fitting.data_ptr() <= large.data_ptr() < fitting.data_ptr() + memory.ROOM + memory.SPARE


def test_the_arena_grows_for_a_larger_layer_only_while_no_block_is_in_use() -> None:
    pool = HostPool()
    used = whole(pool.take(2 * MIB).fill_(7))
    pool.reserve(memory.KEPT * 4)
    assert pool.take(2 * MIB).data_ptr() == used.data_ptr() + 2 * MIB, (
        "the stretch was changed under a tensor"
    )
    assert used.unique().tolist() == [7]
    del used
    pool.reserve(memory.KEPT * 4)
    large = whole(pool.take(memory.KEPT * 4))
    assert pool.take(2 * MIB).data_ptr() == large.data_ptr() + memory.KEPT * 4


def test_between_reloads_a_bounded_part_of_the_arena_stays_resident() -> None:
    pool = HostPool()
    pool.reserve(memory.KEPT * 4)
    whole(pool.take(memory.KEPT * 4)).fill_(1)
    before = memory.resident()
    pool.settle()
    assert before - memory.resident() >= memory.KEPT * 2
    kept = whole(pool.take(memory.KEPT))
    kept.fill_(2)
    pool.settle()
    assert kept.unique().tolist() == [2], "memory in use was given back"


# --- the C heap ---

TCMALLOC = next(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.*"), None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What an allocator with 100 MiB to spare, in a process of 500 MiB, is asked to give back."""
    found: list[int] = []
    monkeypatch.setattr(memory, "allocator", lambda: memory.Allocator("one", lambda: 100 * MIB, found.append))
    monkeypatch.setattr(memory, "resident", lambda: 500 * MIB)
    return found


@pytest.mark.parametrize(
    ("limit", "needed", "back"),
    [(600, 200, []), (590, 200, [10]), (500, 100, []), (500, 101, [1]), (400, 0, [100])],
)
def test_the_heap_releases_only_what_exceeds_the_limit(
    asked: list[int], limit: int, needed: int, back: list[int]
) -> None:
    memory.keep_within(limit * MIB, needed * MIB)
    assert asked == [nbytes * MIB for nbytes in back]


@pytest.mark.parametrize(("unused", "back"), [(memory.IDLE, []), (memory.IDLE + MIB, [MIB])])
def test_between_reloads_the_heap_keeps_a_bounded_part(
    monkeypatch: pytest.MonkeyPatch, unused: int, back: list[int]
) -> None:
    found: list[int] = []
    monkeypatch.setattr(memory, "allocator", lambda: memory.Allocator("one", lambda: unused, found.append))
    memory.settle_heap()
    assert found == back


class Process:
    """A process of some size whose allocator does not say what it keeps, and what is asked of that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes, self.unused = 500 * MIB, 0
        self.trims = 0
        self.kept: list[tuple[int, int]] = []
        self.growth = memory.Growth()
        heap = memory.Allocator("one", None, self._trim, lambda *asked: self.kept.append(asked))
        monkeypatch.setattr(memory, "allocator", lambda: heap)
        monkeypatch.setattr(memory, "resident", lambda: self.nbytes)
        monkeypatch.setattr(memory, "growth", self.growth)

    def _trim(self, _: int) -> None:
        self.trims += 1
        self.nbytes -= self.unused
        self.unused = 0

    def reload(self, grows: int) -> None:
        """A reload that leaves so many more bytes in a heap that does not use them."""
        self.growth.begin()
        self.nbytes += grows
        self.unused += grows
        memory.settle_heap()


def test_a_heap_that_does_not_say_what_it_keeps_is_trimmed_once_the_process_grew_by_more_than_may_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = Process(monkeypatch)
    process.reload(memory.KEPT + memory.IDLE - MIB)
    assert process.trims == 0
    for _ in range(5):  # what it kept is used again
        process.reload(0)
    assert process.trims == 0
    process.reload(2 * MIB)
    assert (process.trims, process.nbytes) == (1, 500 * MIB)


def test_growth_counts_from_the_last_trim_and_from_when_the_process_was_smallest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = Process(monkeypatch)
    process.reload(memory.KEPT + memory.IDLE + MIB)
    assert process.trims == 1
    process.nbytes += memory.KEPT + memory.IDLE + MIB  # somebody else's, and in use
    process.reload(0)
    assert process.trims == 2
    process.reload(memory.IDLE)
    assert process.trims == 2
    process.nbytes -= memory.KEPT + memory.IDLE  # given up again: the next growth counts from here
    process.reload(memory.KEPT + 1)
    assert process.trims == 2
    process.reload(memory.IDLE)
    assert process.trims == 3


def test_the_first_reload_of_a_process_has_the_heap_keep_what_the_next_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = Process(monkeypatch)
    process.reload(0)
    process.reload(0)
    assert process.kept == [(memory.IDLE, memory.BLOCK)]


FREE = """
import ctypes, sys
from reload_plugin.device import host_memory as memory
heap, size = ctypes.CDLL(None), int(sys.argv[2]) << 20
heap.malloc.argtypes, heap.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
heap.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    memory.allocator().keep(512 << 20, 60 << 20)
blocks = [heap.malloc(size) for _ in range(4)]  # nothing else lies between them, or behind
for block in blocks:
    ctypes.memset(block, 1, size)
full = memory.resident()
for block in reversed(blocks):
    heap.free(block)
print(full - memory.resident() >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(
    ("asked", "size", "setting", "gone"),
    [
        ("leave", 30, {}, True),  # MiB of each of four blocks
        ("keep", 30, {}, False),
        ("leave", 50, {}, True),
        ("keep", 50, {}, False),
        ("keep", 70, {}, True),
        ("keep", 30, {"MALLOC_TRIM_THRESHOLD_": str(1 << 20)}, True),
        ("keep", 30, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}, True),
        ("keep", 30, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, False),
    ],
)
def test_glibc_keeps_what_it_is_asked_to_unless_the_environment_says_otherwise(
    asked: str, size: int, setting: dict[str, str], gone: bool
) -> None:
    if memory.allocator().name != "glibc":  # type: ignore[union-attr]
        pytest.skip("another allocator is in the way")
    child = [sys.executable, "-c", FREE, asked, str(size)]
    out = subprocess.run(child, env=os.environ | setting, capture_output=True, text=True, check=True).stdout
    assert (int(out) > 3 * size) is gone


GROW_AND_GIVE_BACK = """
import torch
from reload_plugin.device import host_memory as memory
blocks = [torch.ones(4 << 20) for _ in range(32)]
del blocks
full = memory.resident()
memory.settle_heap()
settled = memory.resident()
print(memory.allocator().name, (full - settled) >> 20)
"""


@pytest.mark.parametrize(
    ("name", "preload"),
    [
        ("glibc", ""),
        pytest.param(
            "tcmalloc", str(TCMALLOC), marks=pytest.mark.skipif(TCMALLOC is None, reason="needs tcmalloc")
        ),
    ],
)
def test_the_process_has_an_allocator_that_releases_unused_memory(name: str, preload: str) -> None:
    environment = os.environ | {"LD_PRELOAD": preload}
    child = [sys.executable, "-c", GROW_AND_GIVE_BACK]
    out = subprocess.run(child, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == name
    if name == "tcmalloc":  # 512 MiB, of which it may keep IDLE; glibc's gives such blocks back when freed
        assert int(out[1]) > 200
