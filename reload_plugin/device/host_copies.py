"""Values of device memory copied to host memory, through a ring of pinned blocks."""

from __future__ import annotations

import threading

import torch

SLOT = 16 << 20
"""Bytes of one block: long enough for the full rate of the bus."""
SLOTS = 8
"""Blocks of a ring; together 128 MiB of pinned memory, whatever the size of the largest tensor."""


class HostCopies:
    """Copies to pageable host memory that are queued on the current stream. One object a session.

    Device memory may be overwritten by work that is queued later on the same stream. The copies can be read
    after ``finish``.

    Args:
        device: that memory is copied from.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: list[_Slot] = []
        self._next = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in host memory, of the same sizes and strides, that has the values of ``tensor`` after
        ``finish``. No device memory is allocated.
        """
        source = _bytes_of(tensor)
        target = torch.empty(source.numel(), dtype=torch.uint8)
        start = 0
        while start < source.numel():
            slot = self._open_slot()
            start += slot.take(source[start:], target[start:])
        return target.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())

    def finish(self) -> None:
        """Wait for what is still on its way, and give the ring back."""
        slots, self._slots, self._next = self._slots, [], 0
        for slot in slots:
            slot.empty()
        with _lock:
            _unused.extend(slot.memory for slot in slots)

    def _open_slot(self) -> _Slot:
        """The block that is being filled; the next one, emptied, when that is full."""
        if self._slots and not self._slots[self._next].full:
            return self._slots[self._next]
        if self._slots:
            self._slots[self._next].seal()
            self._next = (self._next + 1) % SLOTS
        if self._next == len(self._slots):
            self._slots.append(_Slot(_pinned_block(), self._device))
        slot = self._slots[self._next]
        slot.empty()
        return slot


class _Slot:
    """One block of the ring: what it holds, and where that goes."""

    def __init__(self, memory: torch.Tensor, device: torch.device) -> None:
        self.memory, self._device = memory, device
        self._used = 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(bytes of the block, where they go)."""
        self._sealed: torch.Event | None = None

    @property
    def full(self) -> bool:
        return self._used >= SLOT or self._sealed is not None

    def take(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Queue a copy of as much of ``source`` as fits. Returns how many bytes."""
        count = min(source.numel(), SLOT - self._used)
        part = self.memory[self._used : self._used + count]
        part.copy_(source[:count], non_blocking=True)
        self._waiting.append((part, target[:count]))
        self._used += count
        return count

    def seal(self) -> None:
        """Everything that it is to hold is queued."""
        if self._sealed is None:
            self._sealed = torch.Event(device=self._device)
            self._sealed.record(torch.accelerator.current_stream(self._device))

    def empty(self) -> None:
        """Bring what it holds to where that goes."""
        if self._waiting:
            self.seal()
        if self._sealed is not None:
            self._sealed.synchronize()
        for part, target in self._waiting:
            copy_on_host(target, part)
        self._waiting, self._used, self._sealed = [], 0, None


def copy_on_host(target: torch.Tensor, source: torch.Tensor) -> None:
    """A copy from one place of host memory to another, on this thread."""
    target.copy_(source)


_lock = threading.Lock()
_unused: list[torch.Tensor] = []
"""Pinned blocks for the next session: to pin memory takes longer than to copy it."""


def _pinned_block() -> torch.Tensor:
    with _lock:
        if _unused:
            return _unused.pop()
    return torch.empty(SLOT, dtype=torch.uint8, pin_memory=True)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element of a tensor."""
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    start = tensor.storage_offset() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), start, (count * tensor.element_size(),), (1,))
