"""Ctrl-C during a reload: it waits for a moment at which nothing is half done.

Most of a reload puts objects from one state into another; an exception between two of those lines would leave
some in each. So SIGINT is only noted while our own code runs. It is raised where the caller's code runs (an
iterator that may wait for a trainer), between two weights, and at the end.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

try:  # what is below ``signal``'s functions, which make enums of all answers: too dear for each weight
    import _signal as fast  # type: ignore[import-not-found]
except ImportError:
    fast = signal

T = TypeVar("T")
Argument = TypeVar("Argument")
Handler = Callable[[int, types.FrameType | None], object]


class _Held:
    """A signal handler that notes what it is told, and whom to tell later."""

    def __init__(self, original: Handler) -> None:
        self.original = original
        self._noted: list[tuple[int, types.FrameType | None]] = []

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        self._noted.append((number, frame))

    def deliver(self) -> None:
        """Tell the original handler what was noted; it usually raises KeyboardInterrupt."""
        if self._noted:
            noted, self._noted = self._noted[0], []
            self.original(*noted)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Ctrl-C waits until the block is over, or until ``deliver`` or ``let_through`` inside it.

    Signals reach the main thread only; in others, and where SIGINT is ignored, this does nothing.
    """
    original = _handler()
    if original is None or isinstance(original, _Held):
        yield
        return
    ours = _Held(original)
    fast.signal(signal.SIGINT, ours)
    try:
        yield
    finally:
        fast.signal(signal.SIGINT, original)
    ours.deliver()


@contextlib.contextmanager
def let_through() -> Iterator[None]:
    """Around code of the caller's, inside ``held``: Ctrl-C works there as it does outside."""
    ours = _handler()
    if not isinstance(ours, _Held):
        yield
        return
    ours.deliver()
    try:
        try:
            fast.signal(signal.SIGINT, ours.original)
            yield
        finally:
            fast.signal(signal.SIGINT, ours)
    finally:
        fast.signal(signal.SIGINT, ours)  # again: Ctrl-C may have come before the one above was done


def call_out(call: Callable[[Argument], T], argument: Argument) -> T:
    """The same around one call. Plain code, because it is done for each weight."""
    ours = _handler()
    if not isinstance(ours, _Held):
        return call(argument)
    ours.deliver()
    try:
        try:
            fast.signal(signal.SIGINT, ours.original)
            return call(argument)
        finally:
            fast.signal(signal.SIGINT, ours)
    finally:
        fast.signal(signal.SIGINT, ours)


def deliver() -> None:
    """A moment at which nothing is half done: raise what was noted so far."""
    ours = _handler()
    if isinstance(ours, _Held):
        ours.deliver()


def call_between(call: Callable[[Argument], T], argument: Argument) -> T:
    """Run code of our own that is reached when nothing is half done: what was noted is raised first."""
    deliver()
    return call(argument)


def call_held(call: Callable[[Argument], T], argument: Argument) -> T:
    """Run code of our own on the way back, inside ``held``: Ctrl-C goes on waiting."""
    return call(argument)


def _handler() -> Handler | None:
    """What handles SIGINT in this thread, if it can be called."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handler: Any = fast.getsignal(signal.SIGINT)
    return handler if callable(handler) else None
