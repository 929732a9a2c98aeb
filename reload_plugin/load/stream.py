"""The stream of weights: each is checked, then loaded by the copy plan or by the model's loader."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..device.default_device import callers_default_device
from ..device.stream_order import SourceReads, copy_for_later
from ..errors import ReloadError, SourceError
from ..interrupts import call_out
from ..plan.loader_run import LIMIT, load_all
from ..plan.source import DirectRead
from ..plan.tracer import LoadTrace

Fetching = Callable[[Callable[[Iterator[Any]], Any], Iterator[Any]], Any]
"""Calls ``next`` with the weights: whether Ctrl-C may come then."""


class WeightStream:
    """The caller's weights, each checked before the model's loader gets it.

    ``between`` runs when the loader asks for the next weight: no loader is then in the middle of a write. No
    tensor of the caller's is kept longer than that.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        trace: LoadTrace,
        between: Callable[[], None],
        aside: Callable[[str, torch.Tensor], bool] | None = None,
        fetching: Fetching = call_out,
        used_late: Callable[[str], bool] | None = None,
        reads: SourceReads | None = None,
    ) -> None:
        try:
            self._weights = iter(weights)
        except TypeError as error:
            raise SourceError(
                f"weights_iterator is a {type(weights).__name__}, not an iterable of (name, tensor). "
                "The engine serves what it served before."
            ) from error
        self._stays = isinstance(weights, (list, tuple))
        """Whether all weights are there at once: none of them is overwritten for the next."""
        self._trace = trace
        self._between = between
        self._aside = aside
        """Returns whether it has dealt with a weight (spilled it), so that the weight is not loaded now."""
        self._fetching = fetching
        self._used_late = used_late
        """Returns whether the loader may read a weight after it has asked for the next one. The loader then
        gets a copy, because the caller may overwrite its memory.
        """
        self._reads = reads
        """Copies from the weight that came last: they are done before the next one is asked for."""
        self._last: torch.Tensor | None = None
        """The weight that the loader has now."""
        self.exhausted = False
        self.waited = 0.0
        """Seconds spent in the source: reading files, or in the caller's iterator."""

    @functools.cached_property
    def _callers_device(self) -> torch.device | None:
        return callers_default_device()

    def __iter__(self) -> WeightStream:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        while True:
            self._trace.end()
            last, self._last = self._last, None
            if last is not None:
                self.note_read(last)
            del last
            self._in_between()
            name, tensor = self.fetch()
            if tensor is not None:
                self._last = tensor
                late = self._used_late is not None and self._used_late(name)
                ours = copy_for_later(tensor) if late else tensor.detach()
                self._trace.begin(name, ours, late)
                return name, ours

    def note_read(self, tensor: torch.Tensor) -> None:
        """All copies from this weight are queued."""
        if self._reads is not None:
            self._reads.note(tensor)

    def _in_between(self) -> None:
        try:
            self._between()
        except ReloadError:
            raise
        except Exception as error:
            raise ReloadError(
                f"Finishing a layer after {self._trace.current!r} failed with "
                f"{type(error).__name__}: {error}. The engine serves what it served before."
            ) from error

    def fetch(self) -> tuple[str, torch.Tensor | None]:
        """The next (name, tensor) pair, or (name, None) when it must not be loaded.

        Raises:
            StopIteration: there are no more weights.
            SourceError: the caller's iterator raised, or gave something else than a pair.

        """
        return self._pair(self._fetch())

    def fetch_item(self) -> DirectRead | tuple[str, torch.Tensor | None]:
        """Like ``fetch``, and also gives direct reads: tensors that were read into place already."""
        item = self._fetch()
        return item if isinstance(item, DirectRead) else self._pair(item)

    def _pair(self, item: object) -> tuple[str, torch.Tensor | None]:
        name, tensor = self._checked(item)
        if tensor is not None and self._aside is not None and self._aside(name, tensor):
            return name, None
        return name, tensor

    def _fetch(self) -> object:
        if self._trace.mismatches.count > LIMIT:
            self.exhausted = True
            raise StopIteration
        if self._reads is not None and not self._stays:
            self._reads.wait()
        started = time.perf_counter()
        try:
            if not torch._C._len_torch_dispatch_stack() and self._callers_device is None:
                return self._fetching(next, self._weights)
            with _disable_current_modes(), self._callers_device or contextlib.nullcontext():
                return self._fetching(next, self._weights)
        except StopIteration:
            self.exhausted = True
            if self._reads is not None:
                self._reads.wait()
            raise
        except ReloadError:
            raise
        except Exception as error:
            raise SourceError(
                f"The weights stopped after {self._trace.loaded.count} tensors: "
                f"{type(error).__name__}: {error}. The engine serves what it served before."
            ) from error
        finally:
            self.waited += time.perf_counter() - started

    def _checked(self, item: object) -> tuple[str, torch.Tensor | None]:
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)):
            raise SourceError(
                f"Weight {self._trace.loaded.count} is {_describe(item)}, not a (name, tensor) pair. "
                "The engine serves what it served before."
            )
        name, tensor = item
        mismatches = self._trace.mismatches
        if not isinstance(tensor, torch.Tensor):
            mismatches.misshapen[name] = f"a {type(tensor).__name__}, not a tensor"
        elif tensor.is_meta:
            mismatches.misshapen[name] = "a meta tensor, which has no values"
        elif self._trace.loaded.has(name):
            mismatches.duplicate[name] = "sent more than once"
        else:
            return name, tensor
        return name, None


def _describe(item: object) -> str:
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {[type(part).__name__ for part in item]}"
    return f"a {type(item).__name__}"


class PlanLoader(Protocol):
    """Loads weights without the model's loader."""

    def copy_by_plan(self, name: str, tensor: torch.Tensor) -> bool:
        """Copy a weight by the copy plan. Returns False, and writes nothing, if the plan does not fit it."""

    def take_direct_read(self, direct_read: DirectRead) -> None:
        """Account for weights that were read into place already."""

    def close_complete(self) -> None:
        """Process the layers that the last weight completed."""


def load_by_copy_plan(
    load_weights: Callable[[Any], Any], stream: WeightStream, trace: LoadTrace, loader: PlanLoader
) -> None:
    """Load by the copy plan; weights without a fitting plan go through the model's loader, one at a time.

    Must be called outside the trace, which it enters for the loader only.
    """
    while True:
        try:
            item = stream.fetch_item()
        except StopIteration:
            return
        if isinstance(item, DirectRead):
            loader.take_direct_read(item)
            continue
        name, tensor = item
        del item
        if tensor is None:
            continue
        if not loader.copy_by_plan(name, tensor):
            with trace:
                load_all(load_weights, WeightStream([(name, tensor)], trace, lambda: None), trace)
        stream.note_read(tensor)
        del tensor  # so that its memory is free before a complete layer is processed
        loader.close_complete()
