"""The default device of torch's factories: the CPU inside a reload, the caller's in the caller's iterator."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

_callers: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar("callers_device", default=None)


@contextlib.contextmanager
def cpu_by_default() -> Iterator[None]:
    """Factories without ``device`` allocate on the CPU, as while a cold start loads and processes weights.

    The caller may have chosen another default (``torch.set_default_device``, ``with torch.device(...)``):
    ``callers_default_device`` tells which, and it is the default again afterwards.
    """
    if cpu_is_default():
        yield
        return
    token = _callers.set(torch.get_default_device())
    try:
        with torch.device("cpu"):
            yield
    finally:
        _callers.reset(token)


def cpu_is_default() -> bool:
    """Whether torch's factories allocate on the CPU as it is."""
    return torch.get_default_device().type == "cpu"


def callers_default_device() -> torch.device | None:
    """Inside ``cpu_by_default``: the default that it replaced; None where it replaced none."""
    return _callers.get()
