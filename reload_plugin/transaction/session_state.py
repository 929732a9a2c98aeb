"""The life of a reload session."""

from __future__ import annotations

import enum


class SessionState(enum.Enum):
    """Where a session is. ``serves`` says what the engine answers with then."""

    READY = "ready"
    """Made, nothing begun. The old weights are served."""
    OPEN = "open"
    """Between two calls. The live model shows the old weights and serves them."""
    LOADING = "loading"
    """In a call that loads. The live model may show the load format and cannot serve until the call
    returns."""
    PROCESSING = "processing"
    """In ``finish``: what is left is processed. The live model cannot serve until the call returns."""
    STAGED = "staged"
    """In ``finish``: all new values are prepared, none of them is served unless the strategy commits each
    group when it is done. What comes next is the vote of the ranks and the commit."""
    COMMITTED = "committed"
    """Over. The new weights are served."""
    ABORTED = "aborted"
    """Over. The old weights are served."""
    BROKEN = "broken"
    """Over, after some groups were committed and others not: the model holds a mixture and must not serve
    until the old weights are read again or another reload succeeds."""

    @property
    def serves(self) -> str:
        """A sentence on what is served."""
        if self is SessionState.COMMITTED:
            return "The new weights are served."
        if self is SessionState.BROKEN:
            return "The engine holds a mixture of two generations."
        return "The engine serves what it served before."
