"""Python's garbage collector, paused while many objects are made of which none is garbage.

A full collection looks at everything that vLLM and torch have imported: 30 to 70 ms, whatever it finds. Both
settings are the process's own, so other threads have them too for the time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

from .shared_setting import SharedSetting

_NEVER = (1 << 31) - 1


def _disable() -> Callable[[], object]:
    if not gc.isenabled():
        return lambda: None
    gc.disable()
    return gc.enable


def _put_off_full() -> Callable[[], object]:
    youngest, young, full = gc.get_threshold()
    gc.set_threshold(youngest, young, _NEVER)
    return lambda: gc.set_threshold(youngest, young, full)


_all = SharedSetting(_disable)
_full = SharedSetting(_put_off_full)


def gc_paused() -> contextlib.AbstractContextManager[None]:
    """No collection unless somebody asks for one: for what makes no garbage, or asks when that matters."""
    return _all.wanted()


def full_gc_paused() -> contextlib.AbstractContextManager[None]:
    """Only young objects are collected: what a reload leaves behind is young, and memory may hang on it."""
    return _full.wanted()


def collect_young() -> bool:
    """Where no collection runs by itself, and memory is short: collect what is young. Returns whether it
    did.
    """
    if gc.isenabled():
        return False
    gc.collect(1)
    return True
