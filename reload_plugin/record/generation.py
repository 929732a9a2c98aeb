"""The generation: which weights a model serves, and since when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Generation:
    """The generation of weights that a model answers with. Replaced as a whole, in the step that commits."""

    version: int = 0
    """Reloads committed since the start; 0 is the cold start."""
    weight_version: str | None = None
    """The caller's name for these weights."""
    source: str = "the engine's start"
    digest: str | None = None
    """Of all that the kernels read; None until it was computed. See ``digest.digest``."""
    known: bool = True
    """False where somebody else wrote to the served weights, so that nothing here tells what they are."""
    lost: bool = False
    """Whether the memory of the weights was discarded or overwritten: nothing is served."""
    since: float = field(default_factory=time.time)
    """Unix time (s) of the commit."""

    def with_digest(self, digest: str | None) -> Generation:
        """The same generation with its computed digest."""
        return replace(self, digest=digest)

    def as_lost(self) -> Generation:
        """The same generation, of which nothing is left."""
        return replace(self, digest=None, lost=True)

    def without_digest(self) -> Generation:
        """The same generation with an unknown digest, because the served weights may have been written to."""
        return replace(self, digest=None)
