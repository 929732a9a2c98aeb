"""Slots that several weights are written to: a cold start leaves there the weight that it loads last."""

from __future__ import annotations

import operator
from collections.abc import Callable

from .arrivals import Loaded
from .copy_plan import Slot, StridedCopy


class SlotContention:
    """Tells the one weight from the others, whatever the order in which they come.

    Fused layers share one input scale; a head may be stored under two names.

    Args:
        loaded: its ``tensor_plans`` say where earlier weights were written; receives ``contested``.
        is_later: whether a cold start loads the first of two weights after the second.

    """

    def __init__(self, loaded: Loaded, is_later: Callable[[str, str], bool] = operator.gt) -> None:
        self._loaded = loaded
        self._is_later = is_later
        self._first: dict[Slot, str] = {}
        """The first weight that was written to a slot, of slots with at most one dimension."""

    def is_overwritten(self, copy: StridedCopy, current: str, again: bool) -> bool:
        """Whether a weight that a cold start loads after ``current`` was written to the slot of ``copy``
        already, so that this copy must not be done.

        Args:
            copy: of a part of the weight ``current``.
            current: the weight that is loaded.
            again: whether all elements of the slot had been written before. Matrices are looked up only then,
                which is rare. That fused layers share vectors and numbers (scales, permutations) is not.

        """
        slot = copy.parameter, copy.target
        if len(copy.target.size) < 2:
            first = self._first.setdefault(slot, current)
        elif again:
            first = self._first_at(slot, current)
        else:
            return False
        contested = self._loaded.contested
        if first == current and slot not in contested:
            return False
        contenders = contested.setdefault(slot, {first: None})
        contenders[current] = None
        return any(self._is_later(name, current) for name in contenders)

    def _first_at(self, slot: Slot, current: str) -> str:
        """The first weight that was written to a slot; the current one if no other was."""
        for name, tensor_plan in self._loaded.tensor_plans.items():
            if any((copy.parameter, copy.target) == slot for copy in tensor_plan.copies or ()):
                return name
        return current
