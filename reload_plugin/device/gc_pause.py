"""Python's search for garbage, held back while many objects are made of which none is any.

A full search looks at everything that vLLM and torch have imported: 30 to 70 ms, whatever it finds. Both
settings are the process's own, so other threads have them too for the time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_NEVER = (1 << 31) - 1


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No search unless somebody asks for one: for what makes no garbage, or asks when that matters."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def full_gc_paused() -> Iterator[None]:
    """Only young objects are searched: what a reload leaves behind is young, and memory may hang on it."""
    youngest, young, full = gc.get_threshold()
    gc.set_threshold(youngest, young, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(youngest, young, full)


def collect_young() -> bool:
    """Where no search runs by itself, and memory is short: search what is young. Returns whether it did."""
    if gc.isenabled():
        return False
    gc.collect(1)
    return True
