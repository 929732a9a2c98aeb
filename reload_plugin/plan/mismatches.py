"""Everything about incoming weights that does not fit the model, by kind."""

from __future__ import annotations

from dataclasses import dataclass, field


class RejectedWeightError(Exception):
    """Stops a loader at a weight that does not fit; the reason is already noted."""


@dataclass
class Mismatches:
    """Everything that does not fit, by kind: name -> reason."""

    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    duplicate: dict[str, str] = field(default_factory=dict)
    misshapen: dict[str, str] = field(default_factory=dict)
    nonfinite: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    @property
    def count(self) -> int:
        return sum(map(len, vars(self).values()))
