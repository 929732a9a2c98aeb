"""What a model serves: which generation of weights, since when, and what went wrong last."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Generation:
    """The generation of weights that a model answers with. Replaced as a whole, in the step that commits."""

    version: int = 0
    """Reloads committed since the start; 0 is the cold start."""
    weight_version: str | None = None
    """The caller's name for these weights."""
    source: str = "the engine's start"
    digest: str | None = None
    """Of what the kernels read, once somebody asked; see ``digest.served_digest``."""
    since: float = field(default_factory=time.time)
    """Unix time (s) of the commit."""
