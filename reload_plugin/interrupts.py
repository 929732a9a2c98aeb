"""Ctrl-C during a reload: KeyboardInterrupt is deferred until the model is in a consistent state.

Most of a reload moves objects from one state into another; an exception in between would leave a mixture. So
while our own code runs SIGINT is only noted. It is delivered where the caller's code runs (an iterator that
may wait for a trainer), between two weights, and at the end.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

try:  # ``signal``'s functions convert every answer to an enum, too slow for each weight
    import _signal as fast  # type: ignore[import-not-found]
except ImportError:
    fast = signal

T = TypeVar("T")
Argument = TypeVar("Argument")
Handler = Callable[[int, types.FrameType | None], object]


class _Held:
    """A signal handler that notes signals for the original handler."""

    def __init__(self, original: Handler) -> None:
        self.original = original
        self._noted: list[tuple[int, types.FrameType | None]] = []

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        self._noted.append((number, frame))

    def deliver(self) -> None:
        """Call the original handler if a signal was noted; it usually raises KeyboardInterrupt."""
        if self._noted:
            noted, self._noted = self._noted[0], []
            self.original(*noted)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, or to ``deliver`` or ``let_through`` inside it.

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
    """Around the caller's code inside ``held``: Ctrl-C reaches the original handler at once."""
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
        fast.signal(signal.SIGINT, ours)  # again: a signal may have interrupted the line above


def call_out(call: Callable[[Argument], T], argument: Argument) -> T:
    """``let_through`` around one call. Not a context manager, because it runs for each weight."""
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
    """Deliver a noted signal. Call only where the model is in a consistent state."""
    ours = _handler()
    if isinstance(ours, _Held):
        ours.deliver()


def call_between(call: Callable[[Argument], T], argument: Argument) -> T:
    """Deliver a noted signal, then call our own code with Ctrl-C deferred."""
    deliver()
    return call(argument)


def call_held(call: Callable[[Argument], T], argument: Argument) -> T:
    """Call our own code during a rollback: Ctrl-C stays deferred."""
    return call(argument)


def _handler() -> Handler | None:
    """The SIGINT handler of the main thread; None in other threads and where it is not a function."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handler: Any = fast.getsignal(signal.SIGINT)
    return handler if callable(handler) else None
