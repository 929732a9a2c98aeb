"""What is known of the weights that have arrived: their shapes, where they were written, how to repeat it."""

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
    """The weights that have arrived so far, and what was done with them. Written by whoever loads."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Checkpoint name -> shape, of the weights that were handed over one by one."""
    direct_read: list[DirectRead] = field(default_factory=list)
    """Weights that were read from files straight into staging, many at a time; a source lists each once."""
    written: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Weight -> the parameters that it was written to. Which of their elements were written is in the
    coverage of their storage, and not here once more for each weight, of which there may be very many."""
    tensor_plans: dict[str, TensorPlan] = field(default_factory=dict)
    """Weight -> how to load it again without the model's loader. The copies are empty where the loader used
    nothing of the weight."""
    computed: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    """Weight -> the slots that were written while it was loaded, with values that are no copy of it: computed
    from it, or taken from elsewhere."""
    in_new_parameters: set[str] = field(default_factory=set)
    """Weights from which the loader made parameters that the load format does not have (GGUF)."""
    read_back: set[str] = field(default_factory=set)
    """Parameters that the loader read after other weights had arrived, and the parameters that it wrote what
    it read to. Their layers must not be processed before the last weight: processing replaces the values."""
    contested: dict[Slot, dict[str, None]] = field(default_factory=dict)
    """Slots that several weights were written to -> those weights, in the order of arrival."""
    repeatable: bool = True
    """Whether every weight was written while it was the one being loaded. False if the loader kept one and
    wrote it later, or wrote after the last: then ``tensor_plans`` do not tell what it does."""
    nbytes: int = 0
    """Bytes of all that arrived."""

    @property
    def count(self) -> int:
        """How many weights have arrived."""
        return len(self.shapes) + sum(len(direct_read.names) for direct_read in self.direct_read)

    def note_written(self, name: str, parameter: str) -> None:
        """Elements of a weight were written to a parameter."""
        before = self.written.get(name, ())
        if parameter not in before:
            self.written[name] = _same((*before, parameter))

    def has(self, name: str) -> bool:
        """Whether a weight has arrived already."""
        if name in self.shapes:
            return True
        return bool(self.direct_read) and any(name in direct_read.shapes for direct_read in self.direct_read)
