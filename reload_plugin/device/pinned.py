"""Pinned host memory that one engine's sessions use in turn, and threads that copy into and out of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

SLOT = 16 << 20
"""Bytes of one block: long enough for the full rate of the bus."""
SLOTS = 8
"""Blocks of a ring; together 128 MiB of pinned memory, whatever the size of the largest tensor."""
THREADS = 8
"""Threads of a team at most: one core copies at a fifth of the rate of the bus."""


class PinnedBlocks:
    """Blocks of ``SLOT`` bytes, kept from session to session: to pin memory takes longer than to copy it.

    Each engine has its own. It keeps the blocks of one ring in each direction at most, and allocates none
    before somebody asks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[torch.Tensor] = []

    def take(self) -> torch.Tensor | None:
        """A block, uint8 [SLOT], which is the caller's until ``give_back``; None where the system does not
        let this process pin more memory.
        """
        with self._lock:
            if self._unused:
                return self._unused.pop()
        with contextlib.suppress(RuntimeError):  # torch.OutOfMemoryError is one
            return torch.empty(SLOT, dtype=torch.uint8, device="cpu", pin_memory=True)
        return None

    def give_back(self, blocks: list[torch.Tensor]) -> None:
        """Take back blocks that no queued copy uses any more."""
        with self._lock:
            self._unused += blocks[: 2 * SLOTS - len(self._unused)]


class CopyTeam:
    """Threads that copy within host memory. They start with the first copy and end with ``close``."""

    def __init__(self) -> None:
        self.threads = max(1, min(THREADS, (os.cpu_count() or 1) // 2))
        self._executor: ThreadPoolExecutor | None = None

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: torch.Event | None = None
    ) -> Callable[[], object]:
        """Begin to copy ``source`` to ``target``, once ``after`` has happened on its device.

        Returns:
            A function that waits for the copy, and raises what it raised. Until then the memory of both has
            to stay.

        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.threads, "reload_plugin copies")
        job: Future[None] = self._executor.submit(_copy_after, target, source, after)
        return job.result

    def close(self, drop: bool = False) -> None:
        """End the threads. ``drop``: without the copies that have not begun."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(cancel_futures=drop)


def _copy_after(target: torch.Tensor, source: torch.Tensor, after: torch.Event | None) -> None:
    if after is not None:
        after.synchronize()
    copy_on_host(target, source)


def copy_on_host(target: torch.Tensor, source: torch.Tensor) -> None:
    """A copy from one place of host memory to another, on this thread."""
    target.copy_(source)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element of a tensor: uint8, of one dimension."""
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    start = tensor.storage_offset() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), start, (count * tensor.element_size(),), (1,))
