"""What becomes of a weight before it is loaded: looked at, refused, or put aside on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from ..interrupts import call_between
from ..load.admission import Admission
from ..load.destinations import StagingDestinations
from ..load.overflow import Overflow
from ..load.tied_head import TiedHead
from ..plan.mismatches import Mismatches

Inspect = Callable[[str, torch.Tensor], str | None]
"""Sees a weight as it comes; a text that it returns says why the weight is refused."""


class Screening:
    """Sees every weight before it is loaded, and notes what is wrong with it.

    Args:
        mismatches: learns of weights that do not fit.
        admission: whether there is staging for a weight.
        tied_head: compares a head that is tied to the embedding with it.
        overflow: puts weights aside that come while too many groups wait; None puts none aside.
        inspect: sees every weight.

    """

    def __init__(
        self,
        mismatches: Mismatches,
        admission: Admission,
        tied_head: TiedHead,
        overflow: Overflow | None,
        inspect: Inspect | None,
    ) -> None:
        self.spilled_bytes = 0
        """Bytes that were put aside on disk and loaded from there."""
        self._mismatches, self._admission = mismatches, admission
        self._tied_head, self._overflow, self._inspect = tied_head, overflow, inspect
        self._replaying = False

    def wants_all(self, planned: bool) -> bool:
        """Whether no weight may be read straight to where it goes.

        Args:
            planned: what comes was planned, so that nothing has to be put aside.

        """
        seen = self._inspect is not None or self._tied_head.active
        return seen or (self._overflow is not None and not planned)

    def holds_back(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a weight is not to be loaded now: it came twice, or waits on disk until there is room."""
        if self._replaying:
            return False
        self._tied_head.note(name, tensor)
        if self._inspect is not None and (reason := self._inspect(name, tensor)) is not None:
            self._mismatches.nonfinite[name] = reason  # and load it: it is not missing as well
        if self._overflow is None:
            return False
        if name in self._overflow:
            self._mismatches.duplicate[name] = "sent more than once"
            return True
        if self._admission.admits(name, tensor):
            return False
        self._overflow.add(name, tensor)
        return True

    def load_aside(self, load: Callable[..., object], destinations: StagingDestinations) -> None:
        """Load what was put aside, by ``load`` of the session, now that it can be sorted."""
        if self._overflow is None or not self._overflow.nbytes:
            return
        self._replaying, read = True, destinations.bytes_read
        try:
            replayed = self._overflow.replay(destinations, self._admission.has_begun)
            with contextlib.closing(replayed) as weights:
                load(weights, call_between)
        finally:
            self._replaying, destinations.bytes_read = False, read  # its file is none of the checkpoint's
        self.spilled_bytes = self._overflow.file_bytes
        self._overflow.close()

    def check_tied_head(self) -> None:
        """Note a head that differs from the embedding it is tied to as a weight that does not fit."""
        self._mismatches.unexpected.update(self._tied_head.differing())

    def close(self) -> None:
        """Give the disk space of weights that were put aside back."""
        if self._overflow is not None:
            self._overflow.close()
