"""One thing that ``doctor`` looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``step`` is what to do where it is wrong."""

    what: str
    state: Literal["ok", "wrong", "note"]
    found: str
    step: str = ""
