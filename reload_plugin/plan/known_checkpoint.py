"""What is known of the weights of a reload before they come."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .copy_plan import CopyPlan


def unknown(parameter: str) -> str | None:  # noqa: ARG001 - the shape of an answer
    """Nothing is known about the checkpoint the engine started with."""
    return None


@dataclass(frozen=True)
class KnownCheckpoint:
    """What is known of the weights before they come."""

    names_of_group: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Group name -> all the weights that go into it, where that is known; such a group is processed when
    it has them. Without it, when every element of it has been written."""
    planned: bool = False
    """``names_of_group`` comes from a plan of these very weights."""
    copy_plan: CopyPlan | None = None
    """How to load weights, learnt before; those without a tensor plan go through the model's loader."""
    was_written: Callable[[str], str | None] = unknown
    """How completely the checkpoint the engine started with writes a parameter (``whole``, ``part``,
    ``none``, or None when nothing is known)."""
    start_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> shape in the checkpoint the engine started with, in the order in which a cold start loads them;
    what it passes over or takes in part there is no surprise here."""
    groups: frozenset[str] | None = None
    """Names of the groups that change, for a partial update; None for all."""

    @functools.cached_property
    def _places(self) -> Mapping[str, int]:
        return {name: place for place, name in enumerate(self.start_shapes)}

    def is_later(self, name: str, than: str) -> bool:
        """Whether a cold start loads one weight after another: in the order of the engine's own checkpoint,
        if it has them, else in that of their names, as in a file of safetensors.
        """
        last = len(self._places)
        ours, theirs = self._places.get(name, last), self._places.get(than, last)
        return (ours, name) > (theirs, than)

    def only(self, groups: frozenset[str] | None) -> KnownCheckpoint:
        """The same of some groups; None for all."""
        if groups is None:
            return self
        names = {group: names for group, names in self.names_of_group.items() if group in groups}
        return dataclasses.replace(self, names_of_group=names, groups=groups)
