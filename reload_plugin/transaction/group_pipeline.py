"""From a group that has all its weights to a result that is committed or waits: process, compare, keep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from .. import vllm_api
from ..commit.strategies import CommitLog, CommitStrategy
from ..device.host_memory import growth, keep_within
from ..device.ops import ops_for
from ..device.output_reuse import ReusableOutputs, reusing_served_outputs
from ..load.admission import Admission
from ..load.completeness import Completeness
from ..options import Wanted
from ..plan.tracer import LoadTrace
from ..process.native_handles import Handles, NativeWatch, release_native_memory, watching_native
from ..process.processing import process_group, process_tail
from ..record.model_record import ModelRecord
from ..record.model_view import ModelView
from ..record.staged_group import StagedGroup
from .dispatch import untraced
from .engine_state import EngineState
from .stage_clock import StageClock
from .takeover import Takeover
from .vllm_processing import original_process_weights

HEAP_BUDGET = 112 << 20
"""Bytes that the process may grow by, beyond its largest layer, before freed pages of the heap go back:
kernels pack into the heap, and not all that the old generation leaves there is used again at once. A little
less than the 128 MiB that are promised."""
PROCESSING_BYTES = 64 << 20
"""Bytes of that for what a layer's processing needs only while it runs, which is not known before: four times
the layer, at most so many."""

KEPT_BESIDE = 64 << 20
"""Bytes of a layer up to which its served native memory stays until there is new one. More would not fit the
budget, which also has the beginning of the next layer, and is released before the layer is processed."""

UNCHECKED_BYTES = 8 << 20
"""Bytes of layers that are processed between two looks at the size of the process."""


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
        log: of commits.
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
        log: CommitLog,
        clock: StageClock,
        whole_model: bool,
    ) -> None:
        self.spoiled: str | None = None
        """Why the reload cannot be finished any more, once processing failed."""
        self.takeover: Takeover | None = None
        self.digest: Wanted = True
        """Whether native handles are hashed when they are made: False is no."""
        self._model, self._state, self._record, self._view = model, state, state.record, view
        self._admission = admission
        self._strategy, self._log, self._clock = strategy, log, clock
        self._whole_model = whole_model
        self._open: dict[int, StagedGroup] = {}
        """Groups that wait for weights."""
        self._late: list[StagedGroup] = []
        """Groups that are processed and that the tail of PWAL changes once more."""
        self._complete = CompleteLayers(trace, completeness)
        self._heap = HeapBudget(state.record.largest)
        self._watch = ProcessingWatch()

    def begin(self) -> None:
        """The groups of the view are in load format: they wait for weights."""
        self._open = {id(group): group for group in self._view.groups}

    @property
    def open(self) -> Iterable[StagedGroup]:
        """Groups that wait for weights, in the model's order."""
        return self._open.values()

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What vLLM sets while it loads and processes; one for each call of the session."""
        config = self._record.model_config
        with (
            vllm_api.loading_context(self._record.vllm_config, getattr(config, "dtype", None)),
            contextlib.ExitStack() as self._watch.ends_with,
        ):
            yield

    # -- while weights come ------------------------------------------------------------------------

    def close_complete(self, complete: list[StagedGroup], mismatches: bool) -> None:
        """Process groups that have everything, unless nothing is to be committed anyway."""
        if not complete or self._whole_model or mismatches:
            return
        for group in complete:
            waits = group.group.deferred or group.group.name in self._state.deferred_groups
            if id(group) in self._open and not waits:
                self._close(group)

    def put_back_parameters(self) -> list[str]:
        """Give complete layers the parameters they had; see ``CompleteLayers.put_back``."""
        return self._complete.put_back()

    # -- at the end --------------------------------------------------------------------------------

    def process_rest(self) -> None:
        """Process every group that is left, but for those that vLLM processes last. The view has to be
        shown.
        """
        for group in list(self._open.values()):
            if group.group.deferred:
                continue
            if group.touched or group.group.effect:
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
                self._process(group)
            with self._clock.timed("process"):
                process_tail(self._model, self._record, original_process_weights())
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
                self._process(group)
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

    def _process(self, group: StagedGroup) -> None:
        self.spoiled = f"processing {group.group.name or 'the model'} did not end well"
        released = False
        try:
            with self._clock.timed("process"):
                if self._strategy.commits_each_group:
                    self._log.before_write()
                released = self._release_native_memory(group)
                watched = self._watch.begin(
                    self._record,
                    self._state.handles,
                    self.digest is not False,
                    reuses_outputs=self._strategy.commits_each_group,
                )
                process_group(group, self._record, original_process_weights(), *watched)
        finally:
            if released or group.overwritten or group.written_served_storages():
                self._log.groups.add(group.group.name)
        self.spoiled = None

    def _release_native_memory(self, group: StagedGroup) -> bool:
        """Release the served native memory of a layer that is too large for the budget twice, where served
        values may be gone before there are new ones.
        """
        large = group.group.nbytes > KEPT_BESIDE and not group.group.needs_no_processing
        if not (large and self._strategy.commits_each_group):
            return False
        return release_native_memory(group.made_by_processing(), self._state.handles)

    def _keep(self, group: StagedGroup) -> None:
        at_once = self._strategy.commits_each_group
        with self._clock.timed("commit") if at_once else contextlib.nullcontext():
            self._strategy.keep(group)


class CompleteLayers:
    """Layers that are complete while the model's loader still runs, and what a loader may not do to them.

    Without a loader there is nothing to keep from them, and nothing is noted.

    Args:
        trace: refuses a loader that reads or writes their parameters.
        completeness: tells whether a loader runs.

    """

    def __init__(self, trace: LoadTrace, completeness: Completeness) -> None:
        self._trace, self._completeness = trace, completeness
        self._parameters: list[tuple[str, nn.Module, dict[str, nn.Parameter | None]]] = []
        """Layers, and the parameters they had when they were complete."""

    @property
    def _has_loader(self) -> bool:
        return self._completeness.copy_plan is None

    def guard(self, group: StagedGroup) -> None:
        """Keep the model's loader from what the layers of a group hold now: it is not what was loaded."""
        if not self._has_loader or not group.group.tensors:
            return
        for name, layer in group.layers:
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    self._trace.note_complete(parameter, f"{name}.{key}", group.group.tensors[0].name)

    def remember(self, group: StagedGroup) -> None:
        """Remember the parameters that the layers of a group have."""
        if self._has_loader:
            self._parameters += [(name, layer, dict(layer._parameters)) for name, layer in group.layers]

    def put_back(self) -> list[str]:
        """Give layers the parameters they had, should a loader have given them others.

        Returns the names of those layers.
        """
        changed = []
        for name, layer, parameters in self._parameters:
            now = layer._parameters
            if now.keys() != parameters.keys() or any(now[key] is not parameters[key] for key in now):
                now.clear()
                now.update(parameters)
                changed.append(name)
        return changed

    def forget(self) -> None:
        """Let go of the layers."""
        self._parameters = []


class HeapBudget:
    """Keeps the growth of the C heap within what is promised, on a CPU.

    Args:
        largest: bytes of the model's largest group.

    """

    def __init__(self, largest: int) -> None:
        self._resident = growth.begin()
        self._largest = largest
        self._unchecked = 0
        """Bytes of the layers that were processed since the size of the process was looked at."""

    def before_processing(self, group: StagedGroup, prepared: int) -> None:
        """Make the heap give back what it does not use, if the process grew too much.

        Small layers are looked at together; not at all where processing leaves everything where it is.
        ``prepared``: bytes of results that wait for the commit.
        """
        if group.group.plain:
            return
        nbytes = group.group.nbytes
        self._unchecked += nbytes
        if self._unchecked < UNCHECKED_BYTES:
            return
        self._unchecked = 0
        needed = max(nbytes, min(4 * nbytes, PROCESSING_BYTES))
        keep_within(self._resident + prepared + self._largest + HEAP_BUDGET, needed)


class ProcessingWatch:
    """What watches processing in one call of the session, begun by the first group: to begin takes longer
    than some groups do.
    """

    def __init__(self) -> None:
        self.ends_with = contextlib.ExitStack()
        self._begun: tuple[NativeWatch, ReusableOutputs] | None = None

    def begin(
        self, record: ModelRecord, handles: Handles, hashes: bool, reuses_outputs: bool
    ) -> tuple[NativeWatch, ReusableOutputs]:
        """The watch over native handles, paused, and what hands out served memory for results."""
        if self._begun is None:
            device = record.target_device
            watch = self.ends_with.enter_context
            self.ends_with.callback(setattr, self, "_begun", None)
            native = watch(watching_native(device, handles, hashes))
            outputs = watch(reusing_served_outputs(reuses_outputs and ops_for(device).reuses_outputs))
            native.paused = True
            self._begun = native, outputs
        return self._begun
