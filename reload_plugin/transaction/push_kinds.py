"""Which sets of checkpoint names were pushed into a served model before.

A push through ``model.load_weights`` has no end marker. What was pushed before tells when it is over: the
same names have come again. Only names count, because every rank is offered the same names, while the slots
that they fill differ from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True)
class PushKind:
    """One set of names that was pushed and committed."""

    names: frozenset[str]
    whole: bool
    """Whether these weights are the whole model; else the other weights stayed as they were."""
    repeats: bool = False
    """Whether a name came in more than one call of the push."""


class PushKinds:
    """The kinds of pushes that one model got."""

    def __init__(self) -> None:
        self._kinds: dict[frozenset[str], PushKind] = {}
        self._last: PushKind | None = None

    @property
    def last(self) -> PushKind | None:
        """The kind of the last push that was committed."""
        return self._last

    def learn(self, kind: PushKind) -> None:
        """A push of this kind was committed."""
        self._kinds[kind.names] = kind
        self._last = kind

    def extend_last(self, names: AbstractSet[str]) -> None:
        """More weights came right after the last push, with no forward pass in between: they belong to it."""
        if self._last is not None:
            del self._kinds[self._last.names]
            self.learn(PushKind(self._last.names | names, self._last.whole, self._last.repeats))

    def expected(self, at_start: Callable[[], Iterable[str]]) -> frozenset[str]:
        """Names that end a push when all have come: those of the last one. Empty if nothing is known.

        Args:
            at_start: gives the names that the engine's own checkpoint holds, which the first push is measured
                by.

        """
        return self._last.names if self._last is not None else frozenset(at_start())

    def is_half(self, offered: AbstractSet[str]) -> bool:
        """Whether more weights have to come: a push of this kind was larger, and none was just this large."""
        return frozenset(offered) not in self._kinds and any(offered < known for known in self._kinds)

    def missing(self, offered: AbstractSet[str]) -> list[str]:
        """Names that the smallest known push around this one has and this one has not yet."""
        larger = [known for known in self._kinds if offered < known]
        return sorted(min(larger, key=len) - offered) if larger else []
