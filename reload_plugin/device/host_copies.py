"""Values of device memory copied to host memory, through a ring of pinned blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import pinned
from .pinned import CopyTeam, PinnedBlocks, bytes_of


class HostCopies:
    """Copies to pageable host memory that are queued on the current stream. One object a session.

    Device memory may be overwritten by work that is queued later on the same stream. The copies can be read
    after ``finish``. Where no memory can be pinned, each copy is done when ``copy`` returns.

    Args:
        device: that memory is copied from.
        blocks: pinned memory of the engine.

    """

    def __init__(self, device: torch.device, blocks: PinnedBlocks) -> None:
        self._device, self._blocks = device, blocks
        self._team = CopyTeam()
        self._slots: list[_Slot] = []
        self._next = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in host memory, of the same sizes and strides, that has the values of ``tensor`` after
        ``finish``. No device memory is allocated.
        """
        source = bytes_of(tensor)
        target = torch.empty(source.numel(), dtype=torch.uint8, device="cpu")
        start = 0
        while start < source.numel():
            slot = self._open_slot()
            if slot is None:
                target[start:].copy_(source[start:])
                break
            start += slot.take(source[start:], target[start:])
        return target.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())

    def finish(self, drop: bool = False) -> None:
        """Wait for what is still on its way, and give the ring back.

        Args:
            drop: nobody will read the copies: those that have not begun in host memory are left out.

        """
        slots, self._slots, self._next = self._slots, [], 0
        try:
            for slot in slots:
                slot.finish() if drop else slot.empty()
        finally:
            self._team.close(drop)
        self._blocks.give_back([slot.memory for slot in slots])

    def _open_slot(self) -> _Slot | None:
        """The block that is being filled; the next one, emptied, when that is full. None without a ring."""
        if self._slots and not self._slots[self._next].full:
            return self._slots[self._next]
        if self._slots:
            self._slots[self._next].seal()
            self._next = (self._next + 1) % pinned.SLOTS
        if self._next == len(self._slots):
            memory = self._blocks.take()
            if memory is not None:
                self._slots.append(_Slot(memory, self._device, self._team))
            elif self._slots:
                self._next = 0  # a shorter ring
            else:
                return None
        slot = self._slots[self._next]
        slot.empty()
        return slot


class _Slot:
    """One block of the ring: what it holds, and where that goes."""

    def __init__(self, memory: torch.Tensor, device: torch.device, team: CopyTeam) -> None:
        self.memory, self._device, self._team = memory, device, team
        self._used = 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(bytes of the block, where they go)."""
        self._sealed: torch.Event | None = None
        self._jobs: list[Callable[[], object]] = []

    @property
    def full(self) -> bool:
        return self._used >= self.memory.numel() or self._sealed is not None

    def take(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Queue a copy of as much of ``source`` as fits. Returns how many bytes."""
        count = min(source.numel(), self.memory.numel() - self._used)
        part = self.memory[self._used : self._used + count]
        part.copy_(source[:count], non_blocking=True)
        self._waiting.append((part, target[:count]))
        self._used += count
        return count

    def seal(self) -> None:
        """Everything that it is to hold is queued: a thread takes it on when it is there."""
        if self._sealed is None:
            self._sealed = torch.Event(device=self._device)
            self._sealed.record(torch.accelerator.current_stream(self._device))
            self._jobs = [self._team.copy(target, part, self._sealed) for part, target in self._waiting]

    def empty(self) -> None:
        """Wait until all that it holds is where it goes."""
        if self._waiting:
            self.seal()
        for wait in self._jobs:
            wait()
        self._forget()

    def finish(self) -> None:
        """Wait until the device does not write to it any more."""
        if self._waiting:
            self.seal()
        if self._sealed is not None:
            self._sealed.synchronize()
        self._forget()

    def _forget(self) -> None:
        self._waiting, self._jobs, self._used, self._sealed = [], [], 0, None
