"""Who has the served weights of a model out of their places at the moment.

Whoever reads what is served (a digest) asks them whether it is all there, and keeps others from beginning
meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Protocol


class Change(Protocol):
    """A reload, while the served weights may not be in their places."""

    def show_served_if_idle(self) -> bool:
        """Whether all that is served is in its place, and stays there until the reload goes on."""


class Changes:
    """The reloads of one model that have begun and are not over."""

    def __init__(self) -> None:
        self._reading = threading.RLock()
        """Held while what is served is read: no reload begins meanwhile."""
        self._changes: weakref.WeakSet[Change] = weakref.WeakSet()

    def begin(self, change: Change) -> None:
        """Called before anything that is served may be elsewhere, until ``end``."""
        with self._reading:
            self._changes.add(change)

    def end(self, change: Change) -> None:
        """What is served is in its places again. Harmless where ``begin`` was not called."""
        self._changes.discard(change)

    @contextlib.contextmanager
    def blocked(self) -> Iterator[bool]:
        """For the time of the block no reload begins. Yields whether all that is served is in its place."""
        with self._reading:
            yield all(change.show_served_if_idle() for change in list(self._changes))

    def __bool__(self) -> bool:
        return bool(self._changes)
