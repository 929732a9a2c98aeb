"""The end of a session: process what is left, agree with the other ranks, commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..interrupts import deliver
from ..record.changes import Change
from ..record.late_bound import make_anew
from .misplaced_weights import refuse_rearranged_experts
from .session_parts import SessionParts
from .session_state import SessionState


class Finished(Change, Protocol):
    """What this needs of a session."""

    state: SessionState
    source: str
    weight_version: str | None


def process_and_commit(session: Finished, parts: SessionParts, agree: Callable[[], None]) -> None:
    """Process the groups that are left, and commit what the strategy has prepared.

    Args:
        session: goes through PROCESSING and STAGED to COMMITTED, as far as all went well.
        parts: its collaborators.
        agree: called between the last preparation and the first commit; raises where none is to commit.

    """
    refuse_rearranged_experts(parts.state)
    session.state = SessionState.PROCESSING
    with parts.processing.context():
        parts.load_format.enter(session)
        parts.strategy.begin_finish()
        parts.pipeline.process_rest()
        parts.pipeline.process_tail()
    parts.load_format.check_untouched(session.source)
    deliver()
    parts.log.refuse_unmakeable()
    session.state = SessionState.STAGED
    agree()
    with parts.clock.timed("commit"):
        parts.strategy.commit_all()
        make_anew(parts.record.late_bound)
        parts.log.after_writes()
        session.state = SessionState.COMMITTED
        parts.state.commit(session.weight_version, session.source)
        parts.strategy.release_all()
        if parts.log.undo is not None:
            parts.log.undo.keep()
