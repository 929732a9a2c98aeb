"""Processing what is served once more, to see whether it comes out as it is."""

from __future__ import annotations

from torch import nn

from ..interrupts import held
from ..plan.known_checkpoint import KnownCheckpoint
from .engine_state import EngineState
from .session_parts import SessionOptions, wire


class Rehearsal:
    """Loads nothing and commits nothing: groups start from the values they serve and are processed.

    Args:
        model: that is rehearsed.
        state: of the model.
        groups: names of the groups.

    """

    def __init__(self, model: nn.Module, state: EngineState, groups: frozenset[str]) -> None:
        options = SessionOptions(known=KnownCheckpoint(groups=groups), from_served=True)
        self._parts = wire(model, state, options)

    def changed_groups(self) -> list[str]:
        """Names of the groups that would not come out bit for bit as they are served."""
        parts = self._parts
        with held(), parts.state.in_a_call():
            try:
                with parts.processing.context():
                    parts.load_format.enter(self)
                    parts.pipeline.process_all()
                    parts.pipeline.process_tail()
                return [commit.name for _, commit in parts.strategy.waiting if not commit.changes_nothing()]
            finally:
                parts.load_format.put_back()
                parts.load_format.leave(self)
                parts.state.pool.settle()

    def show_served_if_idle(self) -> bool:
        """Whether all that is served is in its place: not while this runs."""
        return False
