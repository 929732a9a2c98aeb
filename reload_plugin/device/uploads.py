"""Host memory copied to a device, through a ring of pinned blocks that threads fill."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from . import pinned
from .pinned import CopyTeam, PinnedBlocks, bytes_of, copy_on_host

PART = 1 << 20
"""Bytes that one thread copies at least: for less, to wake it costs more than the copy."""


class Copies(Protocol):
    """See ``DeviceOps.copy`` and ``DeviceOps.copy_bytes``."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``source`` keeps its values until ``sources_read``, and its memory until the device is fenced."""

    def copy_bytes(self, target: torch.UntypedStorage, start: int, source: torch.Tensor) -> bool:
        """Whether it was done."""


class Copier(Copies, Protocol):
    """Copies of one session into staging."""

    def sources_read(self) -> None:
        """Wait until the host memory that was copied from may be overwritten, and queue all copies."""

    def finish(self) -> None:
        """Wait for the copies, and give memory and threads back. Copies may be made again afterwards."""


class Uploads:
    """Copies to a device. Those from pageable host memory go through a ring and are queued on the current
    stream; torch's would wait for the device once a tensor, at a fifth of the rate of the bus.

    Args:
        device: that is copied to.
        blocks: pinned memory of the engine. Where none can be pinned, and for None, torch copies.

    """

    def __init__(self, device: torch.device, blocks: PinnedBlocks | None) -> None:
        self._device, self._blocks = device, blocks
        self._team = CopyTeam()
        self._slots: list[_Slot] = []
        self._next = 0
        self._parts: deque[_Part] = deque()
        """Parts that threads copy into the ring, in the order in which they are queued for the device."""
        self._without_ring = blocks is None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Torch's copy where the bytes have to change on the way, or are not in pageable host memory."""
        if self._without_ring or not _goes_as_it_is(target, source):
            target.copy_(source)
            return
        given, taken = bytes_of(source), bytes_of(target)
        nbytes, start = given.numel(), 0
        each = max(PART, -(-nbytes // self._team.threads))
        while start < nbytes:
            slot = self._open_slot()
            if slot is None:
                target.copy_(source)
                return
            count = min(each, nbytes - start, slot.left)
            place = slot.take(count)
            part = given[start : start + count]
            if nbytes < PART:
                copy_on_host(place, part)
                self._parts.append(_Part(None, place, taken[start : start + count], slot))
            else:
                wait = self._team.copy(place, part)
                self._parts.append(_Part(wait, place, taken[start : start + count], slot))
            start += count

    def copy_bytes(self, target: torch.UntypedStorage, start: int, source: torch.Tensor) -> bool:
        """No shortcut: the address means nothing to the host."""
        del target, start, source
        return False

    def sources_read(self) -> None:
        """Wait for the threads, and queue what they copied."""
        while self._parts:
            self._queue_next()

    def finish(self) -> None:
        """Wait until the device has read the ring, and give it back."""
        try:
            self.sources_read()
        finally:
            self._team.close()
            self._parts.clear()
        slots, self._slots, self._next = self._slots, [], 0
        for slot in slots:
            slot.seal(self._device)
            slot.wait()
        if self._blocks is not None:
            self._blocks.give_back([slot.memory for slot in slots])

    def _queue_next(self) -> None:
        wait, place, target, slot = self._parts.popleft()
        if wait is not None:
            wait()
        target.copy_(place, non_blocking=True)
        slot.unqueued -= 1
        if slot.full and not slot.unqueued:
            slot.seal(self._device)

    def _open_slot(self) -> _Slot | None:
        """The block that is being filled, or the next one, when the device has read it."""
        if self._slots:
            if not self._slots[self._next].full:
                return self._slots[self._next]
            self._next = (self._next + 1) % pinned.SLOTS
        if self._next == len(self._slots):
            memory = None if self._blocks is None else self._blocks.take()
            if memory is not None:
                self._slots.append(_Slot(memory))
            elif self._slots:
                self._next = 0  # a shorter ring
            else:
                self._without_ring = True
                return None
        slot = self._slots[self._next]
        while slot.unqueued:
            self._queue_next()
        slot.wait()
        return slot


class _Slot:
    """One block of the ring."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.unqueued = 0
        """Parts of it that are not queued for the device yet."""
        self._used = 0
        self._read: torch.Event | None = None

    @property
    def left(self) -> int:
        """Bytes that can be taken."""
        return self.memory.numel() - self._used

    @property
    def full(self) -> bool:
        return not self.left

    def take(self, count: int) -> torch.Tensor:
        """The next ``count`` bytes."""
        self._used += count
        self.unqueued += 1
        return self.memory[self._used - count : self._used]

    def seal(self, device: torch.device) -> None:
        """All copies from it are queued."""
        if self._read is None and self._used:
            self._read = torch.Event(device=device)
            self._read.record(torch.accelerator.current_stream(device))

    def wait(self) -> None:
        """Wait until the device has read it: it is empty then."""
        read, self._read, self._used = self._read, None, 0
        if read is not None and not read.query():
            read.synchronize()


class _Part(NamedTuple):
    wait: Callable[[], object] | None
    """For the copy into the ring; None where that is done."""
    place: torch.Tensor
    target: torch.Tensor
    slot: _Slot


def _goes_as_it_is(target: torch.Tensor, source: torch.Tensor) -> bool:
    plain = target.dtype == source.dtype and target.shape == source.shape
    whole = target.is_contiguous() and source.is_contiguous()
    there = source.is_cpu and not target.is_cpu and source.numel() > 0 and source.data_ptr() != 0
    return (
        plain and whole and there and not source.is_conj() and not source.is_neg() and not source.is_pinned()
    )
