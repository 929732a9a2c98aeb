"""A device in software, as torch's device type ``sim``: what a machine without a GPU has in place of one.

Memory that traps the host, streams that run only when somebody waits for them, events, pinned memory, a
caching allocator with a limit and an exact peak, counters and a virtual clock. ``loading.load`` compiles it
when it is first asked for (g++ and ninja, half a minute) and caches it. It becomes torch's accelerator for
the rest of the process, so its tests run in a process of their own: ``process.on_sim``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Counters:
    """Since the last ``reset``. Bytes of the payload; seconds of the virtual clock.

    Memory is in bytes, now and at the most; each allocation on the device is rounded up to 512 bytes.
    """

    launches: int
    synchronizations: int
    event_waits: int
    segments: int
    """Allocations that the caching allocator could not serve from what it had."""
    copies_to_device: int
    copies_to_host: int
    copies_on_device: int
    bytes_to_device: int
    bytes_to_host: int
    bytes_on_device: int
    fallbacks: int
    """Operators that ran on the CPU; each counts as one launch."""
    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    pinned: int
    peak_pinned: int
    limit: int
    host_seconds: float
    """Of the virtual clock."""
    measured_seconds: float
    """Of these, processor time that was measured: see ``timing``."""


class SimDevice:
    """The device ``sim``; there is one.

    Args:
        compiled: the extension module.

    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self.device = torch.device("sim", 0)

    @property
    def counters(self) -> Counters:
        """Counts, memory and the clock, now."""
        found = self._compiled.counters()
        return Counters(**{name: value if "seconds" in name else int(value) for name, value in found.items()})

    def reset(self) -> None:
        """Counters to zero, peaks to what is allocated, the clock to zero."""
        self._compiled.reset()

    @contextlib.contextmanager
    def limit(self, nbytes: int) -> Iterator[None]:
        """Within, allocations that would need more than so many reserved bytes raise
        ``torch.OutOfMemoryError``.
        """
        before = self.counters.limit
        self._compiled.set_limit(nbytes)
        try:
            yield
        finally:
            self._compiled.set_limit(before)

    @contextlib.contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Within, queued work also runs when nobody waits for it, at times that depend on the seed."""
        self._compiled.set_order(seed)
        try:
            yield
        finally:
            self._compiled.set_order(-1)

    @contextlib.contextmanager
    def pinned_limit(self, nbytes: int) -> Iterator[None]:
        """Within, to pin more than so many bytes of host memory raises ``torch.OutOfMemoryError``."""
        self._compiled.set_pinned_limit(nbytes)
        try:
            yield
        finally:
            self._compiled.set_pinned_limit(1 << 40)

    @contextlib.contextmanager
    def timing(self, scale: float = 1.0, moves: bool = True) -> Iterator[None]:
        """Within, the virtual clock also runs while this thread computes outside of the device's calls, by
        the thread's processor time. So work of the host and of the device overlap as they would.

        Args:
            scale: each payload counts for so many times its bytes.
            moves: False leaves queued copies and fills out, whose bytes would pass through this processor's
                cache and leave the host's code slower than it is. Values are then wrong.

        """
        self.synchronize()
        self._compiled.set_timing(True, moves, scale)
        try:
            yield
        finally:
            self.synchronize()
            self._compiled.set_timing(False, True, 1.0)

    def advance(self, seconds: float) -> None:
        """Add to the virtual clock: the host worked so long."""
        self._compiled.advance(seconds)

    def wait_until(self, seconds: float) -> float:
        """The host waits until then, if that is to come. Returns the virtual clock."""
        now: float = self._compiled.wait_until(seconds)
        return now

    def seconds_of(self, event: torch.Event) -> float:
        """When a recorded event happens, by the virtual clock."""
        found: float = self._compiled.event_seconds(event.event_id)
        return found

    @contextlib.contextmanager
    def pool(self, tag: str) -> Iterator[None]:
        """Within, new memory belongs to a pool that can sleep."""
        self._compiled.open_pool(tag)
        try:
            yield
        finally:
            self._compiled.open_pool("")

    def sleep(self, tag: str, discard: bool) -> None:
        """Memory of the pool may not be touched until ``wake``; its values are lost if ``discard``."""
        if discard:
            self._compiled.discard(tag)
        self._compiled.set_asleep(tag, True)

    def wake(self, tag: str) -> None:
        """Memory of the pool may be touched again, at the addresses it had."""
        self._compiled.set_asleep(tag, False)

    def traps(self) -> list[str]:
        """What the host did to device memory since this was last asked. The next operation of the device
        would raise it.
        """
        found: list[str] = self._compiled.take_traps()
        return found

    def is_live(self, address: int, nbytes: int) -> bool:
        """Whether the bytes lie in memory that is allocated."""
        found: bool = self._compiled.is_live(address, nbytes)
        return found

    def synchronize(self) -> None:
        """Run all queued work of all streams."""
        self._compiled.synchronize()

    def empty_cache(self) -> None:
        """Give back memory that is reserved and not allocated."""
        self._compiled.empty_cache()


def missing_tools() -> list[str]:
    """Programs that compiling the device needs and that are not to be found."""
    return [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
