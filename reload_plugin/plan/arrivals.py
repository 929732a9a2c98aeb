"""What a stream of weights has brought so far."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from .copy_plan import Slot, TensorPlan
from .source import DirectRead


@functools.lru_cache(maxsize=4096)
def _same(parameters: tuple[str, ...]) -> tuple[str, ...]:
    """The same object for the same parameters: many experts are in one."""
    return parameters


@dataclass
class Loaded:
    """What a stream has brought so far."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the weights that were handed over one by one."""
    direct_read: list[DirectRead] = field(default_factory=list)
    """Those that were read to where they go, many at a time; a source lists each once."""
    written: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Weight -> the parameters that its slots are in. Which of their elements were written is in their
    storage's coverage, and not here once more for each weight, of which there may be very many."""
    tensor_plans: dict[str, TensorPlan] = field(default_factory=dict)
    """How to do the same with a weight that was handed over again, without the loader; those that the loader
    only passed over were not written anywhere."""
    computed: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    """Where the loader wrote what it made of a weight, or what it had from elsewhere while the weight was the
    last that had come."""
    in_new_parameters: set[str] = field(default_factory=set)
    """Weights for which the loader made parameters."""
    read_back: set[str] = field(default_factory=set)
    """Parameters that the loader took values from when other weights had come, and those it wrote them to."""
    contested: dict[Slot, dict[str, None]] = field(default_factory=dict)
    """Slots that the loader wrote several weights to, and those."""
    repeatable: bool = True
    """False when the loader kept a weight back and wrote it later, or wrote more after the last one."""
    nbytes: int = 0

    @property
    def count(self) -> int:
        """How many weights came."""
        return len(self.shapes) + sum(len(direct_read.names) for direct_read in self.direct_read)

    def note_written(self, name: str, parameter: str) -> None:
        """Something of a weight was written to a parameter."""
        before = self.written.get(name, ())
        if parameter not in before:
            self.written[name] = _same((*before, parameter))

    def has(self, name: str) -> bool:
        """Whether a weight came already."""
        if name in self.shapes:
            return True
        return bool(self.direct_read) and any(name in direct_read.shapes for direct_read in self.direct_read)
