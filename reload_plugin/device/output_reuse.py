"""Results of processing, written straight to where they are served.

A kernel's packing asks for memory like the weight's (``torch.empty_like``) and fills it. Left alone that is
memory fresh from the system for every layer, whose pages cost more than the packing, and a copy into the
served tensor afterwards. Where a layer's served values may be overwritten anyway, the served memory itself is
handed out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..tensors import storage_id, wraps_others
from .shared_setting import SharedSetting


class ReusableOutputs:
    """Served memory that is handed out to who asks for memory like it.

    Args:
        wanted: whether any is.

    """

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted
        self._thread = threading.get_ident()
        self._served: Callable[[], Sequence[torch.Tensor]] | None = None
        self._free: list[torch.Tensor] | None = None
        self._given: set[int] = set()

    @contextlib.contextmanager
    def offered(self, served: Callable[[], Sequence[torch.Tensor]]) -> Iterator[set[int]]:
        """For the time, hand out these tensors' memory, each once.

        Args:
            served: gives the tensors whose values may be overwritten; contiguous ones on the CPU are. Asked
                when somebody wants memory, at most once.

        Yields:
            Identities of the storages that were handed out so far. A result in one of them that belongs
            elsewhere has to be copied before anything is written there.

        """
        self._served, self._given = served if self._wanted else None, set()
        try:
            yield self._given
        finally:
            self._served = self._free = None

    def like(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A served tensor of this one's shape and dtype, if one is offered to this thread."""
        if self._served is None or threading.get_ident() != self._thread or not _is_plain(tensor):
            return None
        if self._free is None:
            offered = self._served()
            self._free = [t for t in offered if t.numel() and _is_plain(t) and not t.is_inference()]
        for number, place in enumerate(self._free):
            if place.shape == tensor.shape and place.dtype == tensor.dtype:
                del self._free[number]
                self._given.add(storage_id(place) or 0)
                return place.detach()
        return None


_of_thread = threading.local()
"""``places``: what is offered in this thread, the innermost last."""


def _patch_empty_like() -> Callable[[], object]:
    """Replace the name in ``torch``; modes would disturb the ``torch.compile`` that some methods use while
    they process. Code that is being compiled gets the plain function, as does every thread to which nothing
    is offered.
    """
    original = torch.empty_like

    def empty_like(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        offered: list[ReusableOutputs] = getattr(_of_thread, "places", [])
        if args or kwargs or not offered or torch.compiler.is_compiling():
            return original(tensor, *args, **kwargs)
        place = offered[-1].like(tensor)
        return original(tensor) if place is None else place

    torch.empty_like = empty_like  # type: ignore[assignment]
    return lambda: setattr(torch, "empty_like", original)


_patched = SharedSetting(_patch_empty_like)


@contextlib.contextmanager
def reusing_served_outputs(wanted: bool = True) -> Iterator[ReusableOutputs]:
    """While entered, ``torch.empty_like`` of a tensor like one that is offered gives that one's memory.

    Args:
        wanted: False leaves ``torch`` as it is.

    """
    places = ReusableOutputs(wanted)
    if not wanted:
        yield places
        return
    offered = _of_thread.__dict__.setdefault("places", [])
    with _patched.wanted():
        offered.append(places)
        try:
            yield places
        finally:
            offered.remove(places)


def _is_plain(tensor: torch.Tensor) -> bool:
    on_cpu = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return on_cpu and tensor.is_contiguous() and not wraps_others(type(tensor))
