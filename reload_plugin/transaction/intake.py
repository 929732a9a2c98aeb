"""Weights on their way into staging: by the copy plan, by the model's own loader, or put aside on disk."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..device.ops import ops_for
from ..device.stream_order import SourceReads
from ..interrupts import call_between
from ..load.admission import Admission
from ..load.completeness import Completeness
from ..load.destinations import StagingDestinations, StagingMemory
from ..load.overflow import Overflow
from ..load.stream import Fetching, WeightStream, load_by_copy_plan
from ..load.tied_head import TiedHead
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
from .stage_clock import StageClock

Inspect = Callable[[str, torch.Tensor], str | None]
"""Sees a weight as it comes; a text that it returns says why the weight is refused."""


class Intake:
    """Takes weights in, and closes groups that have all of theirs.

    Args:
        model: that is reloaded.
        state: of the model.
        view: shown before the model's own loader runs.
        trace: watches that loader.
        completeness: which weights came and which groups are complete.
        admission: whether there is staging for a weight.
        memory: staging of a parameter, allocated.
        known: what is known of the weights before they come.
        pipeline: takes complete groups.
        clock: seconds by stage.
        overflow: puts weights aside that come while too many groups wait; None puts none aside.
        inspect: sees every weight.

    """

    def __init__(
        self,
        model: nn.Module,
        state: EngineState,
        view: ModelView,
        trace: LoadTrace,
        completeness: Completeness,
        admission: Admission,
        memory: StagingMemory,
        known: KnownCheckpoint,
        pipeline: GroupPipeline,
        clock: StageClock,
        overflow: Overflow | None,
        inspect: Inspect | None,
    ) -> None:
        self.spilled_bytes = 0
        """Bytes that were put aside on disk and loaded from there."""
        self._model, self._state, self._view = model, state, view
        self._trace, self._completeness, self._admission = trace, completeness, admission
        self._memory, self._known, self._pipeline, self._clock = memory, known, pipeline, clock
        self._overflow, self._inspect = overflow, inspect
        self._replaying = False
        self._ops = ops_for(state.record.target_device)
        self._reads = SourceReads(self._ops)
        # Destinations in staging are for weights that nobody wants to see or to put aside on the way.
        self._tied_head = TiedHead(state.record, known)
        seen = inspect is not None or self._tied_head.active
        by_hand = seen or (overflow is not None and not known.planned)
        self.destinations = StagingDestinations(completeness, memory, by_hand)

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
            weights, self._trace, self.close_complete, self._put_aside, fetching, used_late, self._reads
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
        if not self._put_aside(name, tensor):
            self.copy_by_plan(name, tensor)
            self._reads.note(tensor)
            self._reads.wait()
            return self._complete()
        return []

    def load_aside(self, load: Callable[..., object]) -> None:
        """Load what was put aside, by ``load`` of the session, now that it can be sorted."""
        if self._overflow is None or not self._overflow.nbytes:
            return
        self._replaying = True
        try:
            replayed = self._overflow.replay(self.destinations, self._admission.has_begun)
            with contextlib.closing(replayed) as weights:
                load(weights, call_between)
        finally:
            self._replaying = False
        self.spilled_bytes = self._overflow.nbytes
        self._overflow.close()

    def check_tied_head(self) -> None:
        """Note a head that differs from the embedding it is tied to as a weight that does not fit."""
        self._mismatches.unexpected.update(self._tied_head.differing())

    def close(self) -> None:
        """Give the disk space of weights that were put aside back."""
        if self._overflow is not None:
            self._overflow.close()

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
            copy_by_plan(without, tensor, self._memory, self._ops)
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

    def _put_aside(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a weight is not to be loaded now: it came twice, or waits on disk until there is room."""
        if self._replaying:
            return False
        self._tied_head.note(name, tensor)
        if self._inspect is not None and (reason := self._inspect(name, tensor)) is not None:
            self._mismatches.nonfinite[name] = reason  # and load it: it is not missing as well
        if self._overflow is None:
            return False
        if name in self._overflow:
            self._mismatches.duplicate[name] = "sent more than once"
            return True
        if self._admission.admits(name, tensor):
            return False
        self._overflow.add(name, tensor)
        return True
