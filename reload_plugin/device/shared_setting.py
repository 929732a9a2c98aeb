"""Changes of the whole process that several reloads may want at one time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class SharedSetting:
    """A change of the process: made by the first who wants it, undone when the last one leaves.

    In whatever order they leave: two that saved and restored a value each by themselves would leave the value
    of the wrong one behind.

    Args:
        change: makes the change; returns what undoes it.

    """

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._wanted = 0
        self._undo: Callable[[], object] | None = None

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """For the time of the block the change is made."""
        with self._lock:
            if self._wanted == 0:
                self._undo = self._change()
            self._wanted += 1
        try:
            yield
        finally:
            with self._lock:
                self._wanted -= 1
                if self._wanted == 0 and (undo := self._undo) is not None:
                    self._undo = None
                    undo()
