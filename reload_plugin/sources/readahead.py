"""Reading files ahead of whoever uses them: a few threads that fill memory they were given."""

from __future__ import annotations

import errno
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import torch

from ..errors import SourceError
from ..team import share
from . import vectored
from .vectored import IOV_MAX, Parts

SHARED = 1 << 20
"""Bytes that one thread of a team reads at a time."""
WORTH_SHARING = 8 << 20
"""Bytes that one request reads from which on a team reads them: its threads have to wait for one another at
the end, and where others want the cores too, that costs more than the smaller ones gain."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file and the memory they go to. Holds the tensor, so that its memory stays."""

    handle: int
    start: int
    tensor: torch.Tensor
    file: str
    name: str

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


class Run(NamedTuple):
    """Neighbouring bytes of a file, which one call reads, and the memory that they go to."""

    handle: int
    start: int
    parts: Parts
    nbytes: int
    """Of all parts."""
    place_at: Callable[[int], tuple[str, str]]
    """Byte of the file -> the file and the tensor that it belongs to, for messages."""


@dataclass(eq=False)
class PageCache:
    """What reads have met so far. While all that they wanted was in memory, nobody tells the system what will
    be read next: looking that up would cost a sixth of the reading.
    """

    missed: bool = not hasattr(os, "RWF_NOWAIT")
    """Whether a read had to wait for the storage, or would not say."""

    def read(self, handle: int, parts: Parts, position: int) -> int:
        """``preadv``, which looks whether it has to wait until one had to."""
        if not self.missed:
            try:
                return vectored.preadv(handle, parts, position, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            self.missed = True
        return vectored.preadv(handle, parts, position)


@dataclass(eq=False)
class Batch:
    """Runs that are read together; ``wait`` returns when they are there."""

    runs: Sequence[Run]
    cache: PageCache
    by_waiter: bool = False
    """Nobody else reads it."""
    held: Sequence[object] = ()
    """What owns the memory."""
    _done: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None

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
            if self.by_waiter and sum(run.nbytes for run in self.runs) >= WORTH_SHARING:
                pieces = [piece for run in self.runs for piece in _pieces_of(run)]
                share(lambda number: _read_run(pieces[number], self.cache), len(pieces))
                return
            for run in self.runs:
                _read_run(run, self.cache)
        except BaseException as error:  # noqa: BLE001 - raised again where the batch is waited for
            self._error = error
        finally:
            self._done.set()


READERS = 4
"""Threads that read at one time, if there are cores for them: one does not keep a fast disk busy."""


class ReadAhead:
    """Threads that take up batches in the order in which they were asked for.

    The memory of a batch must stay until the batch was waited for or this context was left: leaving it
    waits for the reads that are under way and drops the rest. Without a core to spare there is no thread,
    and who waits for a batch reads it: a reader that shares its core with an OpenMP worker holds up all
    the others, who spin until that one is done.
    """

    def __init__(self) -> None:
        self.cache = PageCache()
        self._wanted = min(READERS, _cores() - torch.get_num_threads())
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

    def submit(self, runs: Sequence[Run], held: Sequence[object]) -> Batch:
        """Have ``runs`` read soon; ``held`` owns their memory."""
        batch = Batch(runs, self.cache, not self.threaded, held)
        if self.threaded:
            self._batches.put(batch)
        return batch

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None and not self._stop:
            batch.read()


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def runs_of(pieces: Sequence[Piece]) -> list[Run]:
    """Pieces as runs: neighbours in one file together."""
    joined: list[list[Piece]] = []
    handle, end = -1, -1
    for piece in pieces:
        nbytes = piece.nbytes
        if not nbytes:
            continue
        if piece.start == end and piece.handle == handle and len(joined[-1]) < IOV_MAX:
            joined[-1].append(piece)
        else:
            joined.append([piece])
        handle, end = piece.handle, piece.start + nbytes
    return [_run_of(run) for run in joined]


def _run_of(pieces: Sequence[Piece]) -> Run:
    sizes = [piece.nbytes for piece in pieces]
    parts = vectored.parts_at([piece.address for piece in pieces], sizes)
    return Run(pieces[0].handle, pieces[0].start, parts, sum(sizes), functools.partial(_place_at, pieces))


def _pieces_of(run: Run) -> Iterator[Run]:
    """A run as runs of at most ``SHARED`` bytes, which several threads can read."""
    if run.nbytes <= SHARED:
        yield run
        return
    for first, parts in vectored.in_pieces(run.parts, SHARED):
        yield Run(run.handle, run.start + first, parts, min(SHARED, run.nbytes - first), run.place_at)


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


def _read_run(run: Run, cache: PageCache) -> None:
    """Read neighbouring bytes, going on after a short read."""
    parts, done = run.parts, 0
    while done < run.nbytes:
        got = cache.read(run.handle, parts, run.start + done)
        done += got
        if got == 0:
            file, name = run.place_at(run.start + done)
            raise SourceError(f"{file} ends in the middle of {name}: it was cut while it was read.")
        if done < run.nbytes:
            parts = vectored.cut(run.parts, done, run.nbytes)
