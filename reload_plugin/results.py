"""Results of processing, written straight to where they are served.

A kernel's packing asks for memory like the weight's (``torch.empty_like``) and fills it. Left alone that is
memory fresh from the system for every layer, whose pages cost more than the packing, and a copy into the
served tensor afterwards. Where a layer's served values may be overwritten anyway, the served memory itself is
handed out.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .tensors import storage_id, wraps_others


@contextlib.contextmanager
def written_in_place(served: Callable[[], Sequence[torch.Tensor]] | None) -> Iterator[set[int]]:
    """While entered, ``torch.empty_like`` of a tensor like a served one gives that one's memory, once.

    The name in ``torch`` is replaced for the time; modes would disturb the ``torch.compile`` that some
    methods use while processing. Code that is being compiled, and other threads, get the plain function.

    Args:
        served: gives the tensors whose values may be overwritten; contiguous ones on the CPU are. Asked when
            somebody wants memory, at most once. None where none may be: ``torch`` stays as it is.

    Yields:
        Identities of the storages that were handed out so far. A result in one of them that belongs
        elsewhere has to be copied before anything is written there.

    """
    given: set[int] = set()
    if served is None:
        yield given
        return

    @functools.cache
    def free() -> list[torch.Tensor]:
        return [t for t in served() if t.numel() and _is_plain(t) and not t.is_inference()]

    original, thread = torch.empty_like, threading.get_ident()

    def empty_like(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        elsewhere = torch.compiler.is_compiling() or threading.get_ident() != thread
        if elsewhere or args or kwargs or not _is_plain(tensor):
            return original(tensor, *args, **kwargs)
        for number, place in enumerate(free()):
            if place.shape == tensor.shape and place.dtype == tensor.dtype:
                del free()[number]
                given.add(storage_id(place) or 0)
                return place.detach()
        return original(tensor)

    torch.empty_like = empty_like  # type: ignore[assignment]
    try:
        yield given
    finally:
        torch.empty_like = original


def _is_plain(tensor: torch.Tensor) -> bool:
    on_cpu = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return on_cpu and tensor.is_contiguous() and not wraps_others(type(tensor))
