"""Who has the served weights of a model out of their places at the moment.

Whoever reads what is served (a digest) asks them to show it first, and keeps others from beginning meanwhile.
"""

from __future__ import annotations

import threading
from typing import Protocol

from .model_record import ModelRecord

making = threading.RLock()
"""Held while a digest is made: no reload begins meanwhile."""


class Change(Protocol):
    """A reload, while the served weights may not be in their places."""

    def show_served_if_idle(self) -> bool:
        """Show what is served, all of it, until the reload goes on. Says whether that could be done."""


def before_change(record: ModelRecord, change: Change) -> None:
    """Called before anything that is served may be elsewhere, until ``after_change``."""
    with making:
        record.changes.add(change)


def after_change(record: ModelRecord, change: Change) -> None:
    """What is served is in its places again. Harmless where ``before_change`` was not called."""
    record.changes.discard(change)
