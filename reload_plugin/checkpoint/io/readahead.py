"""Read-ahead: a few threads that fill memory they were given, so that reading and processing overlap.

For speed on a CPU; without spare cores everything is read on the caller's thread.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import torch

from ...device.host_memory import view_of
from ...device.openmp import run_on_openmp_threads
from ...errors import SourceError
from . import vectored
from .stamps import WRITE_AGAIN
from .vectored import IOV_MAX, IoVec

SHARED = 1 << 20
"""Bytes that one OpenMP thread reads at a time."""
WORTH_SHARING = 8 << 20
"""Bytes of a request from which on OpenMP threads read it together. Joining them costs more than a smaller
request gains where other processes use the cores too."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file and the tensor they are read into, which it keeps alive."""

    handle: int
    start: int
    tensor: torch.Tensor
    file: str
    name: str

    skipped: int = 0
    """Bytes of the tensor before the first that is read, which is byte ``start`` of the file."""
    limit: int = 1 << 62
    """Bytes that are read at most."""

    @property
    def address(self) -> int:
        return self.tensor.data_ptr() + self.skipped

    @property
    def nbytes(self) -> int:
        return min(self.tensor.numel() * self.tensor.element_size() - self.skipped, self.limit)

    def split(self) -> Iterator[Piece]:
        """The same in pieces of at most ``SHARED`` bytes; none where there are no bytes."""
        nbytes = self.nbytes
        if 0 < nbytes <= SHARED:
            yield self
            return
        for first in range(0, nbytes, SHARED):
            yield Piece(
                self.handle,
                self.start + first,
                self.tensor,
                self.file,
                self.name,
                self.skipped + first,
                min(SHARED, nbytes - first),
            )


class Run(NamedTuple):
    """At most ``SHARED`` contiguous bytes of a file that one system call reads, and the memory they go to."""

    handle: int
    start: int
    parts: IoVec
    nbytes: int
    """Of all parts."""
    place_at: Callable[[int], tuple[str, str]]
    """Byte of the file -> the file and the tensor that it belongs to, for messages."""


class GappedRun(NamedTuple):
    """Runs of bytes of a file with gaps between them, read one by one, and the memory they go to."""

    handle: int
    start: int
    step: int
    """Bytes from the start of a run to that of the next."""
    each: int
    """Bytes of a run."""
    runs: int
    address: int
    address_step: int
    place_at: Callable[[int], tuple[str, str]]

    @property
    def nbytes(self) -> int:
        """Of all runs."""
        return self.each * self.runs


@dataclass(eq=False)
class PageCache:
    """Whether reads so far were served from the page cache. While they are, no read is announced to the
    kernel: that would cost a sixth of the time of reading.
    """

    missed: bool = not hasattr(os, "RWF_NOWAIT")
    """Whether a read had to wait for the storage, or would not say."""

    def read(self, handle: int, parts: IoVec, position: int) -> int:
        """``preadv``; until one read had to wait, each tries without waiting first (``RWF_NOWAIT``)."""
        if not self.missed:
            try:
                return vectored.preadv(handle, parts, position, os.RWF_NOWAIT)
            except OSError as error:
                self._note_miss(error)
        return vectored.preadv(handle, parts, position)

    def read_into(self, handle: int, memory: memoryview, position: int) -> int:
        """The same, to one place: ``os.preadv`` costs half as much as a table of one."""
        if not self.missed:
            try:
                return os.preadv(handle, (memory,), position, os.RWF_NOWAIT)
            except OSError as error:
                self._note_miss(error)
        return os.preadv(handle, (memory,), position)

    def _note_miss(self, error: OSError) -> None:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
            raise error
        self.missed = True


@dataclass(eq=False)
class Batch:
    """Runs that are read together; ``wait`` returns when they are there."""

    runs: Sequence[Run | GappedRun]
    cache: PageCache
    by_waiter: bool = False
    """Whether ``wait`` reads it on the calling thread."""
    held: Sequence[object] = ()
    """Owners of the memory, kept alive until it is read."""
    _done: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(run.nbytes for run in self.runs)

    def wait(self) -> None:
        """Raises what the reading raised."""
        if self.by_waiter:
            self.read()
        self._done.wait()
        if self._error is not None:
            raise self._error

    def read(self) -> None:
        """Fill the memory; errors are kept for ``wait``."""
        try:
            if self.by_waiter and self.nbytes >= WORTH_SHARING:
                runs, cache = self.runs, self.cache
                run_on_openmp_threads(lambda number: _read_run(runs[number], cache), len(runs))
                return
            for run in self.runs:
                _read_run(run, self.cache)
        except BaseException as error:  # noqa: BLE001 - raised again where the batch is waited for
            self._error = error
        finally:
            self._done.set()


READERS = 4
"""Reader threads at most, if there are cores for them: one does not keep a fast disk busy."""


class ReadAhead:
    """Reader threads that take batches in the order in which they were submitted.

    The memory of a batch must stay until the batch was waited for or this context was left: leaving it waits
    for the reads under way and drops the rest. Without a spare core there is no thread, and ``Batch.wait``
    reads on the calling thread: a reader that shares a core with an OpenMP worker would delay all workers,
    which spin until the last one is done.
    """

    def __init__(self) -> None:
        self.cache = PageCache()
        self._wanted = reader_thread_count()
        self.threaded = self._wanted > 0
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._stop = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> ReadAhead:
        for number in range(self._wanted):
            name = f"reload_plugin reader {number}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        for _ in self._threads:
            self._batches.put(None)
        while self._threads:
            self._threads.pop().join()

    def submit(self, runs: Sequence[Run | GappedRun], held: Sequence[object]) -> Batch:
        """Queue ``runs`` for reading; ``held`` owns their memory."""
        batch = Batch(runs, self.cache, not self.threaded, held)
        if self.threaded:
            self._batches.put(batch)
        return batch

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None and not self._stop:
            batch.read()


def reader_thread_count() -> int:
    """Reader threads that the cores allow beside the kernels' threads; 0 or less without a spare core."""
    return min(READERS, _cores() - torch.get_num_threads())


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def runs_of(pieces: Sequence[Piece]) -> list[Run]:
    """Pieces as runs of at most ``SHARED`` bytes; contiguous small pieces of a file share one."""
    joined: list[list[Piece]] = []
    handle, end, together = -1, -1, 0
    for piece in itertools.chain.from_iterable(map(Piece.split, pieces)):
        nbytes = piece.nbytes
        fits = together + nbytes <= SHARED and joined and len(joined[-1]) < IOV_MAX
        if fits and piece.start == end and piece.handle == handle:
            joined[-1].append(piece)
            together += nbytes
        else:
            joined.append([piece])
            together = nbytes
        handle, end = piece.handle, piece.start + nbytes
    return [_run_of(run) for run in joined]


def _run_of(pieces: Sequence[Piece]) -> Run:
    sizes = [piece.nbytes for piece in pieces]
    parts = vectored.iovec_of([piece.address for piece in pieces], sizes)
    return Run(pieces[0].handle, pieces[0].start, parts, sum(sizes), functools.partial(_place_at, pieces))


def _place_at(run: Sequence[Piece], position: int) -> tuple[str, str]:
    cut = next(piece for piece in run if piece.start + piece.nbytes > position)
    return cut.file, cut.name


def read_piece(piece: Piece) -> None:
    """Read one piece, on this thread.

    Raises:
        SourceError: the file ends before.

    """
    for run in runs_of([piece]):
        _read_run(run, PageCache(missed=True))


def _read_run(run: Run | GappedRun, cache: PageCache) -> None:
    """Read neighbouring bytes, going on after a short read; or runs with gaps between them."""
    if isinstance(run, GappedRun):
        _read_gapped(run, cache)
        return
    handle, start, parts, nbytes, place_at = run
    done = cache.read(handle, parts, start)
    got = done
    while done < nbytes:
        if got == 0:
            raise _cut(place_at(start + done))
        got = cache.read(handle, vectored.from_byte(parts, done), start + done)
        done += got


def _read_gapped(run: GappedRun, cache: PageCache) -> None:
    """Read runs one by one: the bytes between them are not read."""
    memory = view_of(run.address, (run.runs - 1) * run.address_step + run.each)
    handle, each, position, place = run.handle, run.each, run.start, 0
    for _ in range(run.runs):
        done = cache.read_into(handle, memory[place : place + each], position)
        while done < each:
            got = cache.read_into(handle, memory[place + done : place + each], position + done)
            if got == 0:
                raise _cut(run.place_at(position + done))
            done += got
        position += run.step
        place += run.address_step


def _cut(place: tuple[str, str]) -> SourceError:
    file, name = place
    return SourceError(f"{file} ends in the middle of {name}: it was cut while it was read. {WRITE_AGAIN}")
