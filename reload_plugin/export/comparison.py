"""A reload that commits nothing: every layer is loaded and processed, and compared with what is served."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ..checkpoint import Source, TensorInfo
from ..commit.strategies import CommitStrategy, StrategyName
from ..device.gc_pause import full_gc_paused
from ..interrupts import call_between, held
from ..load.overflow import OPEN_STREAMING, Overflow
from ..load.progress import with_progress
from ..plan.checkpoint_plan import Plan
from ..record.staged_group import StagedGroup
from ..transaction.engine_state import EngineState
from ..transaction.known import known_checkpoint
from ..transaction.session_parts import SessionOptions, wire
from .native_twins import NativeTwins
from .trial import difference, handles_forgotten

Compared = dict[str, str | None]
"""Group -> what of it is served with other values, in words; None if nothing is."""


class _Comparing(CommitStrategy):
    """Compares a group's result with what it serves, and drops it: one layer is in memory at a time."""

    name: ClassVar[StrategyName] = "staged"
    commits_each_group = False
    waiting_bytes = OPEN_STREAMING
    twins: NativeTwins
    found: Compared

    def keep(self, group: StagedGroup) -> None:
        commit = self._log.compare(group)
        self.found[group.group.name] = difference(commit, self.twins)
        for storage in self._release(group, set()):
            storage.drop_references()
        group.drop()
        commit.forget()


def _as_they_came(infos: Sequence[TensorInfo]) -> list[str]:
    return [info.name for info in infos]


class Comparison:
    """Loads a source beside what is served, layer by layer.

    Args:
        model: recorded, and not being reloaded.
        state: of the model.
        plan: of the source; None where its loader cannot be planned.

    """

    def __init__(self, model: nn.Module, state: EngineState, plan: Plan | None) -> None:
        self._state, self._plan = state, plan
        self._groups = {group.name: group for group in state.record.groups}
        known = known_checkpoint(model, state, plan)
        overflow = None if known.planned else Overflow(None, _as_they_came)
        self._parts = wire(model, state, SessionOptions(known=known, overflow=overflow, strategy=_Comparing))
        self.ignored: dict[str, str] = {}
        """Names that the model does not use -> rule."""

    def run(self, source: Source, progress: bool | None = None) -> Compared:
        """Compare all groups.

        Raises:
            WeightsError: the weights do not fit the model; it lists all offenders.
            SourceError: they cannot be read.
            ProcessingError: processing refused them.

        """
        parts, state = self._parts, self._state
        strategy = parts.strategy
        assert isinstance(strategy, _Comparing)
        # After a foreign writer a new handle may lie where a known one was.
        strategy.twins = NativeTwins(state.handles if state.generation.known else {})
        strategy.found = {}
        state.pool.reserve(state.record.largest)
        order = self._plan.order if self._plan is not None else None
        with held(), state.in_a_call(), full_gc_paused(), handles_forgotten(state.handles):
            try:
                with parts.processing.context():
                    parts.load_format.enter(self)
                    with parts.trace:
                        reading = source.read(order, state.pool, parts.intake.destinations)
                        with contextlib.closing(with_progress(reading, source, progress, order)) as weights:
                            parts.intake.load(weights, call_between)
                        parts.screening.load_aside(parts.intake.load, parts.intake.destinations)
                    parts.screening.check_tied_head()
                    _, ignored = parts.accounting.check(source.description)
                    parts.pipeline.process_rest()
                    parts.pipeline.process_tail()
            finally:
                parts.load_format.put_back()
                parts.load_format.leave(self)
                parts.screening.close()
                state.pool.settle()
        self.ignored = ignored | (self._plan.ignored if self._plan is not None else {})
        return strategy.found

    def names_of_groups(self) -> dict[str, set[str]]:
        """Group -> the checkpoint tensors that went into it."""
        parts = self._parts
        went = {name: set(parameters) for name, parameters in parts.trace.loaded.written.items()}
        for name, plan in parts.completeness.arrived.items():
            went.setdefault(name, set()).update(copy.parameter for copy in plan.copies or ())
        if self._plan is not None:
            for group, names in self._plan.names_of_group.items():
                for name in names:
                    went.setdefault(name, set()).update(
                        record.name for record in self._groups[group].tensors[:1]
                    )
        found: dict[str, set[str]] = {}
        for name, parameters in went.items():
            for parameter in parameters:
                found.setdefault(self._state.record.group_with(parameter).name, set()).add(name)
        return found

    def show_served_if_idle(self) -> bool:
        """Whether all that is served is in its place: not while this runs."""
        return False
