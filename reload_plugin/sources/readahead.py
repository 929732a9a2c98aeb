"""Reading files ahead of whoever uses them: one thread that fills memory it was given."""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import torch

from ..errors import SourceError

_IOV_MAX = 512
"""Pieces of one vectored read (POSIX promises 16, Linux takes 1024)."""


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


class Spot(NamedTuple):
    """Like ``Piece``, for memory that somebody else holds."""

    handle: int
    start: int
    address: int
    nbytes: int
    file: str
    name: str


@dataclass(eq=False)
class Batch:
    """Pieces that are read together; ``wait`` returns when they are there."""

    pieces: Sequence[Piece | Spot]
    by_waiter: bool = False
    """Nobody else reads it."""
    held: Sequence[torch.UntypedStorage] = ()
    """Memory of the spots."""
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
            for run in _runs(self.pieces):
                _read_run(run)
        except BaseException as error:  # noqa: BLE001 - raised again where the batch is waited for
            self._error = error
        finally:
            self._done.set()


class ReadAhead:
    """A thread that reads batches in the order in which they were asked for.

    The memory of a batch must stay until the batch was waited for or this context was left: leaving it
    waits for the read that is under way and drops the rest. Without a core to spare there is no thread,
    and who waits for a batch reads it: a reader that shares its core with an OpenMP worker holds up all
    the others, who spin until that one is done.
    """

    def __init__(self) -> None:
        self.threaded = _cores() > torch.get_num_threads()
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="reload_plugin reader", daemon=True)

    def __enter__(self) -> ReadAhead:
        if self.threaded:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.threaded:
            self._stop = True
            self._batches.put(None)
            self._thread.join()

    def submit(self, pieces: Sequence[Piece | Spot], held: Sequence[torch.UntypedStorage] = ()) -> Batch:
        """Have ``pieces`` read soon; ``held`` is the memory of those that do not hold their own."""
        batch = Batch(pieces, not self.threaded, held)
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


def _runs(pieces: Sequence[Piece | Spot]) -> list[list[Piece | Spot]]:
    """Neighbours in one file, which one call reads."""
    runs: list[list[Piece | Spot]] = []
    handle, end = -1, -1
    for piece in pieces:
        nbytes = piece.nbytes
        if not nbytes:
            continue
        if piece.start == end and piece.handle == handle and len(runs[-1]) < _IOV_MAX:
            runs[-1].append(piece)
        else:
            runs.append([piece])
        handle, end = piece.handle, piece.start + nbytes
    return runs


def read_piece(piece: Piece) -> None:
    """Read one piece, on this thread.

    Raises:
        SourceError: the file ends before.

    """
    if piece.nbytes:
        _read_run([piece])


def _read_run(run: list[Piece | Spot]) -> None:
    """Read neighbouring pieces, going on after a short read."""
    left = _memory_of(run)
    position = run[0].start
    while left:
        got = os.preadv(run[0].handle, left, position)
        position += got
        if got == 0:
            cut = next(piece for piece in run if piece.start + piece.nbytes > position)
            raise SourceError(f"{cut.file} ends in the middle of {cut.name}: it was cut while it was read.")
        while left and got >= len(left[0]):
            got -= len(left.pop(0))
        if got:
            left[0] = left[0][got:]


def _memory_of(run: list[Piece | Spot]) -> list[memoryview]:
    """The memory that neighbours in a file go to, in as few parts as it has."""
    parts: list[list[int]] = []
    end = -1
    for piece in run:
        address, nbytes = piece.address, piece.nbytes
        if address == end:
            parts[-1][1] += nbytes
        else:
            parts.append([address, nbytes])
        end = address + nbytes
    return [memoryview((ctypes.c_char * size).from_address(at)).cast("B") for at, size in parts]
