"""Seconds of a reload by stage, where stages run inside one another."""

from __future__ import annotations

import time
from collections import defaultdict


class StageClock:
    """Adds up the wall seconds of stages. Those of stages inside ``load`` are not counted there as well."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        """Stages that run now, the outermost first."""
        self._inside_load = 0.0
        self._started = time.perf_counter()

    def timed(self, stage: str) -> _Timed:
        """A context manager around one run of a stage."""
        return _Timed(self, stage)

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds of a stage that somebody else measured, right behind or inside the running one."""
        self._seconds[stage] += seconds
        if self._running[-1:] == ["load"]:
            self._inside_load += seconds

    def add_waiting(self, seconds: float) -> None:
        """Count seconds in which the source had the word: inside of ``load``, but no part of it."""
        self._seconds["read"] += seconds
        self._inside_load += seconds

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds so far, with ``total`` since the clock was made."""
        found = dict(self._seconds)
        found["load"] = max(0.0, found.get("load", 0.0) - self._inside_load)
        found["total"] = time.perf_counter() - self._started
        return found


class _Timed:
    """Times one run of a stage. A class with slots, since there are several runs for every group."""

    __slots__ = ("_clock", "_stage", "_started")

    def __init__(self, clock: StageClock, stage: str) -> None:
        self._clock, self._stage = clock, stage

    def __enter__(self) -> None:
        self._clock._running.append(self._stage)
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        self._clock._running.pop()
        self._clock.add(self._stage, spent)
