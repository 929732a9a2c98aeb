"""Weights on their way into staging: by the copy plan, by the model's own loader, or put aside on disk."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..device.ops import ops_for
from ..device.stream_order import SourceReads
from ..load.completeness import Completeness
from ..load.destinations import StagingDestinations, StagingMemory
from ..load.stream import Fetching, WeightStream, load_by_copy_plan
from ..plan.copy_plan import copy_by_plan
from ..plan.known_checkpoint import KnownCheckpoint
from ..plan.loader_run import load_all, run_loader
from ..plan.mismatches import Mismatches
from ..plan.source import DirectRead
from ..plan.tracer import LoadTrace
from ..record.model_view import ModelView
from ..record.staged_group import StagedGroup
from .dispatch import untraced
from .engine_state import EngineState
from .group_pipeline import GroupPipeline
from .screening import Screening
from .stage_clock import StageClock


class Intake:
    """Takes weights in, and closes groups that have all of theirs.

    Args:
        model: that is reloaded.
        state: of the model.
        view: shown before the model's own loader runs.
        trace: watches that loader.
        completeness: which weights came and which groups are complete.
        memory: staging of a parameter, allocated.
        known: what is known of the weights before they come.
        pipeline: takes complete groups.
        clock: seconds by stage.
        screening: sees every weight before it is loaded.

    """

    def __init__(
        self,
        model: nn.Module,
        state: EngineState,
        view: ModelView,
        trace: LoadTrace,
        completeness: Completeness,
        memory: StagingMemory,
        known: KnownCheckpoint,
        pipeline: GroupPipeline,
        clock: StageClock,
        screening: Screening,
    ) -> None:
        self._model, self._state, self._view = model, state, view
        self._trace, self._completeness, self._memory = trace, completeness, memory
        self._known, self._pipeline, self._clock, self._screening = known, pipeline, clock, screening
        self._ops = ops_for(state.record.target_device)
        self._copier = self._ops.copier(state.pool.pinned)
        self._reads = SourceReads(self._ops, self._copier)
        # Destinations in staging are for weights that nobody wants to see or to put aside on the way.
        by_hand = screening.wants_all(known.planned)
        self.destinations = StagingDestinations(completeness, memory, by_hand, self._ops.reads_files)

    @property
    def needs_view(self) -> bool:
        """Whether weights can only be loaded while the model shows the load format."""
        return self._completeness.copy_plan is None

    def load(self, weights: Iterable[tuple[str, torch.Tensor]], fetching: Fetching) -> set[str] | None:
        """Load weights inside the session's loading context.

        Returns what the model's own ``load_weights`` would: the names of parameters that were written, or
        None if it returns none.
        """
        before = len(self._trace.loaded.tensor_plans)
        returned: list[Any] = []

        def loader(stream: Iterable[tuple[str, torch.Tensor]]) -> None:
            returned.append(self._by_loader(stream))

        used_late = self._may_be_used_late if self.needs_view else None
        stream = WeightStream(
            weights,
            self._trace,
            self.close_complete,
            self._screening.holds_back,
            fetching,
            used_late,
            self._reads,
        )
        if self.needs_view:
            try:
                load_all(loader, stream, self._trace)
            finally:
                self._state.defer_groups_of(self._trace.loaded.read_back)
            if late := self._pipeline.put_back_parameters():
                raise self._trace.late(late[0])
        else:
            with untraced():
                load_by_copy_plan(loader, stream, self._trace, self)
        self._clock.add_waiting(stream.waited)
        names = returned[-1] if returned else None
        return names if self.needs_view else self._written_since(before, names)

    def load_planned(self, name: str, tensor: torch.Tensor) -> list[StagedGroup] | None:
        """Copy one weight by the copy plan, outside the session's loading context.

        Returns:
            The groups that it completed, for ``close_groups``. None where it has to come through ``load``:
            then nothing has changed.

        """
        known = self._trace.loaded
        if self._mismatches or tensor.is_meta or known.has(name):
            return None
        if self._completeness.plan_for_tensor(name, tensor) is None:
            return None
        if not self._screening.holds_back(name, tensor):
            self.copy_by_plan(name, tensor)
            self._reads.note(tensor)
            self._reads.wait()
            return self._complete()
        return []

    def close(self) -> None:
        """Wait for copies that are on their way, and give back what they went through."""
        self._copier.finish()

    # -- what load_by_copy_plan asks of it ---------------------------------------------------------

    def copy_by_plan(self, name: str, tensor: torch.Tensor) -> bool:
        """Load a weight by the copy plan, if that has copies for it that fit."""
        tensor_plan = self._completeness.plan_for_tensor(name, tensor)
        if tensor_plan is None:
            return False
        self._trace.note_arrival(name, tensor, tensor_plan.shape)
        self._trace.current = name
        if not self.destinations.took(name, tensor):
            without = self._completeness.without_overwritten_slots(name, tensor_plan)
            copy_by_plan(without, tensor, self._memory, self._copier)
        self._completeness.note_copied(name, tensor_plan)
        return True

    def take_direct_read(self, direct_read: DirectRead) -> None:
        """Account for weights that were read to where they go, and close groups that are complete."""
        self._trace.note_direct_read(direct_read)
        complete = self._completeness.note_direct_read(direct_read)
        self._pipeline.close_complete(complete, bool(self._mismatches))

    def close_complete(self) -> None:
        """Between two weights: close the groups that have everything."""
        self.close_groups(self._complete())

    def close_groups(self, complete: list[StagedGroup]) -> None:
        """Close groups that have everything."""
        self._pipeline.close_complete(complete, bool(self._mismatches))

    def _complete(self) -> list[StagedGroup]:
        return self._completeness.complete_after(self._trace.current, self._trace.take_recent())

    # -- small things ------------------------------------------------------------------------------

    @property
    def _mismatches(self) -> Mismatches:
        return self._trace.mismatches

    def _by_loader(self, stream: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """The model's own loader; the load format has to be shown for it."""
        with untraced():
            self._view.show()
        return run_loader(self._model, stream)

    def _written_since(self, before: int, by_loader: set[str] | None) -> set[str]:
        plans = itertools.islice(self._trace.loaded.tensor_plans.values(), before, None)
        written = {copy.parameter for tensor_plan in plans for copy in tensor_plan.copies or ()}
        return written if by_loader is None else written | by_loader

    def _may_be_used_late(self, name: str) -> bool:
        """Whether the model's loader may not be done with a weight when it comes back for the next."""
        return name not in self._used_at_once

    @functools.cached_property
    def _used_at_once(self) -> frozenset[str]:
        return frozenset().union(*self._known.names_of_group.values())
