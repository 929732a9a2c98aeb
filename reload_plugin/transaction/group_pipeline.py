"""From a group that has all its weights to a result that is committed or waits: process, compare, keep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from torch import nn

from .. import vllm_api
from ..commit.strategies import CommitStrategy
from ..load.admission import Admission
from ..load.completeness import Completeness
from ..plan.tracer import LoadTrace
from ..record.model_view import ModelView
from ..record.staged_group import StagedGroup
from .complete_layers import CompleteLayers
from .dispatch import untraced
from .engine_state import EngineState
from .group_processing import GroupProcessing
from .heap_budget import HeapBudget
from .stage_clock import StageClock
from .takeover import Takeover


class GroupPipeline:
    """Processes groups and hands their results to the commit strategy.

    Args:
        model: that is reloaded.
        state: of the model.
        view: shows and hides the groups.
        trace: watches the model's loader; learns which parameters belong to complete groups.
        completeness: which groups are complete.
        admission: told of groups that are done.
        strategy: takes results.
        processing: of one group.
        clock: seconds by stage.
        whole_model: process nothing before all weights have come.

    """

    def __init__(
        self,
        model: nn.Module,
        state: EngineState,
        view: ModelView,
        trace: LoadTrace,
        completeness: Completeness,
        admission: Admission,
        strategy: CommitStrategy,
        processing: GroupProcessing,
        clock: StageClock,
        whole_model: bool,
    ) -> None:
        self.takeover: Takeover | None = None
        self._model, self._state, self._view, self._admission = model, state, view, admission
        self._processing, self._strategy, self._clock = processing, strategy, clock
        self._whole_model = whole_model
        self._open: dict[int, StagedGroup] = {}
        """Groups that wait for weights."""
        self._complete_groups: set[int] = set()
        """Identities of groups that have all their weights, where they are processed in the model's order."""
        self._late: list[StagedGroup] = []
        """Groups that are processed and that the tail of PWAL changes once more."""
        self._complete = CompleteLayers(trace, completeness)
        self._heap = HeapBudget(state.record.largest)

    def begin(self) -> None:
        """The groups of the view are in load format: they wait for weights."""
        self._open = {id(group): group for group in self._view.groups}

    @property
    def open(self) -> Iterable[StagedGroup]:
        """Groups that wait for weights, in the model's order."""
        return self._open.values()

    # -- while weights come ------------------------------------------------------------------------

    def close_complete(self, complete: list[StagedGroup], mismatches: bool) -> None:
        """Process groups that have everything, unless nothing is to be committed anyway."""
        if not complete or self._whole_model or mismatches:
            return
        for group in self._in_turn(complete):
            waits = group.group.deferred or group.group.name in self._state.deferred_groups
            if id(group) in self._open and not waits:
                self._close(group)

    def _in_turn(self, complete: list[StagedGroup]) -> list[StagedGroup]:
        """The groups that may be processed now: those that are complete. Where processing enters collectives
        each waits for those before it in the model, so that all ranks have one order. Ranks that have experts
        of their own complete a layer in different calls of one update: then all layers wait for the end.
        """
        if not self._state.enters_collectives:
            return complete
        if self._state.vote is None and vllm_api.spreads_experts(self._state.record.vllm_config):
            return []
        self._complete_groups |= {id(group) for group in complete}
        found = []
        for group in self._open.values():
            if group.group.deferred or not group.group.tensors:
                continue
            if id(group) not in self._complete_groups:
                break
            found.append(group)
        return found

    def put_back_parameters(self) -> list[str]:
        """Give complete layers the parameters they had; see ``CompleteLayers.put_back``."""
        return self._complete.put_back()

    # -- at the end --------------------------------------------------------------------------------

    def process_rest(self) -> None:
        """Process every group that is left, but for those that vLLM processes last. The view has to be
        shown. Groups without weights too, where what they serve is lost.
        """
        for group in list(self._open.values()):
            if group.group.deferred:
                continue
            if group.touched or group.group.effect or self._state.generation.lost:
                self._close(group)
            else:
                self._leave_untouched(group)

    def process_all(self) -> None:
        """The same, whether touched or not."""
        for group in list(self._open.values()):
            if not group.group.deferred:
                self._close(group)

    def process_tail(self) -> None:
        """Attention layers and the model's own hook, with every layer showing its new values."""
        shown = [group for group, _ in self._strategy.waiting if group.result is not None]
        deferred = list(self._open.values())
        done: list[StagedGroup] = []
        try:
            for group in shown:
                group.result.show()  # type: ignore[union-attr]
            for group in deferred:
                self._processing.process(group)
            self._processing.process_tail(self._model)
            done = deferred + self._late
        finally:
            for group in shown:
                group.served.show()
        for group in done:
            group.take_result()
            self._view.release(group)
        self._open, self._late = {}, []
        for group in done:
            self._keep(group)

    def forget(self) -> None:
        """Let go of everything that is not served."""
        self._strategy.forget()
        self.takeover = None
        self._open, self._late = {}, []
        self._complete.forget()

    # -- one group ---------------------------------------------------------------------------------

    def _close(self, group: StagedGroup) -> None:
        """Process one group; keep or commit its result, and show what it serves."""
        released = self.takeover.release(group) if self.takeover is not None else []
        self._admission.done(group.group.name)
        self._heap.before_processing(group, self._strategy.prepared_bytes)
        if was_hidden := group.hidden:
            group.unhide()
        with untraced():
            try:
                self._processing.process(group)
            except BaseException:
                if was_hidden:
                    group.hide()
                raise
            for storage in group.storages:
                storage.closed = True
            del self._open[id(group)]
            if group.group.late:
                self._late.append(group)
                self._guard(group)
                if was_hidden:
                    group.hide()
            else:
                group.take_result()
                self._view.release(group)
                self._guard(group)
                self._keep(group)
                self._complete.remember(group)  # a commit may have given it others
        if self.takeover is not None:
            self.takeover.refuse(group, released)

    def _guard(self, group: StagedGroup) -> None:
        as_loaded = self._strategy.commits_each_group and group.group.plain
        if not as_loaded:
            self._complete.guard(group)

    def _leave_untouched(self, group: StagedGroup) -> None:
        group.served.show()
        del self._open[id(group)]
        self._view.release(group)
        group.drop()

    def _keep(self, group: StagedGroup) -> None:
        at_once = self._strategy.commits_each_group
        with self._clock.timed("commit") if at_once else contextlib.nullcontext():
            self._strategy.keep(group)
