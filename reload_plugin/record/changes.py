"""The reloads of one model that are under way.

A reader of the served weights (a digest) asks whether all of them are on the live model, and blocks new
reloads while it reads.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Protocol


class Change(Protocol):
    """A reload during which the live model may show the load format instead of the served weights."""

    def show_served_if_idle(self) -> bool:
        """Show the served weights if no call of the reload is running. Returns whether they are shown; they
        stay shown until the next call of the reload.
        """


class Changes:
    """The reloads of one model that have begun and are not over."""

    def __init__(self) -> None:
        self._reading = threading.RLock()
        """Held while served weights are read, so that no reload begins meanwhile."""
        self._changes: weakref.WeakSet[Change] = weakref.WeakSet()

    def begin(self, change: Change) -> None:
        """Register a reload before it changes the live model. Blocks while served weights are read."""
        with self._reading:
            self._changes.add(change)

    def end(self, change: Change) -> None:
        """Remove a reload whose served weights are on the live model again. Without ``begin`` does
        nothing.
        """
        self._changes.discard(change)

    @contextlib.contextmanager
    def blocked(self) -> Iterator[bool]:
        """No reload begins inside the block. Yields whether the live model shows all that it serves."""
        with self._reading:
            yield all(change.show_served_if_idle() for change in list(self._changes))

    def __bool__(self) -> bool:
        return bool(self._changes)
