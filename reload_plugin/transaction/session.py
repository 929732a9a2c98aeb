"""The line of a reload, on one screen: record, plan, load, process, commit, verify.

    with ReloadSession(model, source="step 12") as session:
        session.load(weights)        # any number of times
        report = session.finish()

Leaving the block without ``finish`` aborts: the model serves what it served before.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from .. import vllm_api
from ..checkpoint import DirectRead
from ..commit.compare import plan_commit
from ..commit.group_commit import Commit
from ..device.gc_pause import full_gc_paused, gc_paused
from ..device.host_memory import MemoryGauge, growth, keep_within
from ..device.output_reuse import ReusableOutputs, reusing_served_outputs
from ..errors import SERVES_OLD, LateLoaderError, SessionError, SourceError, weights_error
from ..interrupts import call_between, call_out, deliver, held
from ..load.admission import Admission
from ..load.completeness import Completeness
from ..load.destinations import StagingDestinations, StagingMemory
from ..load.overflow import OPEN_BUDGET, OPEN_STREAMING, Overflow
from ..load.stream import Fetching, WeightStream, load_by_copy_plan
from ..options import Wanted
from ..plan.arrivals import Loaded
from ..plan.copy_plan import copy_by_plan
from ..plan.ignore_rules import ignore_rule
from ..plan.known_checkpoint import KnownCheckpoint
from ..plan.loader_run import load_all, run_loader
from ..plan.mismatches import Mismatches
from ..plan.served_guard import served_tensors
from ..plan.slots import check_slots
from ..plan.tracer import LoadTrace
from ..process.native_handles import NativeWatch, forget_handles, release_native_memory, watching_native
from ..process.processing import ProcessWeights, process_stage, process_tail
from ..record.changes import after_change, before_change
from ..record.generation import Generation
from ..record.model_record import complete_record_of
from ..record.model_view import staged_groups
from ..record.module_tree import WrappedTree, rewrap_tree, unwrap_tree
from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage
from ..record.untouched_layers import UntouchedLayers
from ..report import ReloadReport
from ..verify.digest import served_digest

Policy = Literal["staged", "streaming"]

BUDGET = 112 << 20
"""Bytes that the process may grow by, beyond its largest layer, before freed pages of the heap go back:
kernels pack into the heap, and not all that the old generation leaves there is used again at once. A little
less than the 128 MiB that are promised."""
PASSING = 64 << 20
"""Bytes of that for what a layer's processing needs only while it runs, which nobody knows before: four times
the layer, at most so many."""

BESIDE = 64 << 20
"""Bytes of a layer up to which its served native memory stays until there is new one: more would not fit the
budget, which also has the beginning of the next layer, and gives way before the layer is processed."""

SEVERAL = 8 << 20
"""Bytes of layers that are processed between two looks at how large the process is."""


class SessionState(enum.Enum):
    """Where a session is; every state but LOADING and PROCESSING has the served weights in place."""

    READY = "ready"
    OPEN = "open"
    LOADING = "loading"
    PROCESSING = "processing"
    COMMITTED = "committed"
    ABORTED = "aborted"


class _Timed:
    """Times one run of a stage. A class, since there are several for every group."""

    __slots__ = ("_note", "_stage", "_started", "_timing")

    def __init__(self, stage: str, timing: list[str], note: Callable[[str, float], None]) -> None:
        self._stage, self._timing, self._note = stage, timing, note

    def __enter__(self) -> None:
        self._timing.append(self._stage)
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        self._timing.pop()
        self._note(self._stage, spent)


class ReloadSession:
    """One reload of one model, from the first weight to the commit.

    Args:
        model: a model whose load format was recorded.
        source: what to call the weights in messages and in the report.
        policy: ``staged`` keeps every new layer aside until all are done (one kernel-format copy of
            the model) and then commits; ``streaming`` commits each layer when it is done (one layer
            of extra memory), reads what processing leaves where it is straight to where it is served, and
            needs a caller that can bring the old weights back.
        whole_model: process no layer before all weights are loaded (for loaders that revisit layers).
        expected: what is known of the weights before they come.
        overflow: puts weights aside that come while too many layers wait for the rest of theirs.
        inspect: sees every weight as it comes; a text that it returns says that the weight is not finite.
        from_served: layers start from the values they serve, where their load format allows it.
        agree: called with None between the last preparation and the first commit of a ``staged`` reload;
            returns when all ranks are to commit, raises when none is.

    Raises:
        NotRecordedError: the model was built without the plugin.

    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: str = "the iterator",
        policy: Policy = "staged",
        whole_model: bool = False,
        expected: KnownCheckpoint | None = None,
        overflow: Overflow | None = None,
        inspect: Callable[[str, torch.Tensor], str | None] | None = None,
        from_served: bool = False,
        agree: Callable[[BaseException | None], None] | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.policy: Policy = policy
        self.whole_model = whole_model
        self.state = SessionState.READY
        self.mismatches = Mismatches()
        self.committed: set[str] = set()
        """Groups whose served values were touched."""
        self.report: ReloadReport | None = None
        self.failed: str | None = None
        """What the last ``load`` or ``finish`` that raised said."""
        self.digest: Wanted = True
        """Whether to hash what the kernels read; see ``digest.Wanted``."""
        self.holder = f"opened by thread {threading.current_thread().name} of process {os.getpid()}"
        self.weight_version: str | None = None
        """What to call these weights from the commit on."""
        self._spilled = 0
        self._largest = 0
        self._expected = expected or KnownCheckpoint()
        self._overflow = overflow
        self._inspect = inspect
        self._replaying = False
        self._prepared = 0
        """Bytes of the layers that wait for the commit, about as much as their new values take."""
        self._unseen = 0
        """Bytes of the layers that were processed since the process's size was looked at."""
        self._from_served = from_served
        self.agree = agree
        self._spoiled: str | None = None
        self._record = complete_record_of(model)
        self._resident = growth.begin()
        shapes = self._expected.start_shapes
        sharded, is_later = self._record.world_size > 1, self._expected.is_later
        self._trace = LoadTrace(self.mismatches, False, shapes, sharded, is_later)
        self.completeness = Completeness(self._trace.loaded, self.mismatches, self._expected)
        self._seconds: dict[str, float] = defaultdict(float)
        self._timing: list[str] = []
        """Stages that are being timed, the outermost first."""
        self._inside_load = 0.0
        """Seconds of other stages while weights were loaded."""
        self._started = time.perf_counter()
        self._stages: list[StagedGroup] = []
        self._open_stages: dict[int, StagedGroup] = {}
        self._entered = False
        self._shown = False
        self._staged: list[tuple[StagedGroup, Commit]] = []
        self._late: list[StagedGroup] = []
        self._closed: list[tuple[str, nn.Module, dict[str, nn.Parameter | None]]] = []
        """Layers that were complete while the model's loader ran, and the parameters they had then."""
        self._tree: WrappedTree = []
        self._gauge = MemoryGauge()
        self._watching = contextlib.ExitStack()
        """Ends with the context that layers are processed in."""
        self._watched_by: tuple[NativeWatch, ReusableOutputs] | None = None
        """What watches processing in that context, once a layer was processed."""
        waiting = OPEN_BUDGET if policy == "staged" else OPEN_STREAMING
        self._admission = Admission(self._record, self.completeness, self._gauge, waiting)
        self._bystanders: UntouchedLayers | None = None
        self._moved: list[str] = []
        by_hand = inspect is not None or (overflow is not None and not self._expected.planned)
        self._touching = functools.partial(_note_touched, self.committed, self.completeness)
        self._memory = StagingMemory(self.completeness, self._trace, self._record.pool, self._touching)
        self.destinations = StagingDestinations(self.completeness, self._memory, by_hand)

    # -- life -------------------------------------------------------------------------------------

    def __enter__(self) -> ReloadSession:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    @property
    def loaded(self) -> Loaded:
        """What the stream has brought so far."""
        return self._trace.loaded

    def open(self) -> None:
        """Prepare to load. The model goes on serving until the first ``load``."""
        self._require(SessionState.READY)
        self._stages = staged_groups(self._record, self._expected.groups, self._gauge)
        self._largest = self._record.largest
        self._record.pool.reserve(self._largest)
        self.state = SessionState.OPEN

    def load(
        self, weights: Iterable[tuple[str, torch.Tensor]], fetching: Fetching = call_out
    ) -> set[str] | None:
        """Load some of the weights. Returns the names of the parameters they went to, as the model's
        ``load_weights`` does; None if that took them and returns none.

        ``fetching`` asks for the next weight; as it is, Ctrl-C gets through to an iterator.
        """
        before = len(self.loaded.tensor_plans)
        returned = self._load(weights, fetching, last=False)
        if self.completeness.copy_plan is None:
            return returned
        copy_plan = itertools.islice(self.loaded.tensor_plans.values(), before, None)
        written = {copy.parameter for tensor_plan in copy_plan for copy in tensor_plan.copies or ()}
        return written if returned is None else written | returned

    def load_last(self, weights: Iterable[tuple[str, torch.Tensor]], fetching: Fetching = call_out) -> None:
        """The same where ``finish`` comes right after it, and until then nobody wants the model to serve."""
        self._load(weights, fetching, last=True)

    def _load(
        self, weights: Iterable[tuple[str, torch.Tensor]], fetching: Fetching, last: bool
    ) -> set[str] | None:
        returned: list[Any] = []

        def loader(feed: Iterable[tuple[str, torch.Tensor]]) -> None:
            returned.append(run_loader(self.model, feed))

        self.mismatches.missing.clear()  # of a finish that was too early
        used_late = None if self.completeness.copy_plan is not None else self._may_be_used_late
        feed = WeightStream(weights, self._trace, self.close_complete, self._put_aside, fetching, used_late)
        with held(), full_gc_paused(), self._noting_failure(), self._timed("load"), self.loading(last):
            if self.completeness.copy_plan is None:
                try:
                    load_all(loader, feed, self._trace)
                finally:
                    self._record.defer_groups_of(self.loaded.read_back)
                if late := self._put_back_parameters():
                    raise self._trace.late(late[0])
            else:
                with self._untraced():
                    load_by_copy_plan(loader, feed, self._trace, self)
            self._seconds["read"] += feed.waited
            self._inside_load += feed.waited
        return returned[-1] if returned else None

    def _may_be_used_late(self, name: str) -> bool:
        """Whether the model's loader may not be done with a weight when it comes back for the next."""
        return name not in self._used_at_once

    @functools.cached_property
    def _used_at_once(self) -> frozenset[str]:
        return frozenset().union(*self._expected.names_of_group.values())

    def _put_aside(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a weight is not to be loaded now: it is refused, or waits until there is room."""
        if self._replaying:
            return False
        if self._inspect is not None and (reason := self._inspect(name, tensor)) is not None:
            self.mismatches.nonfinite[name] = reason  # and load it: it is not missing as well
        if self._overflow is None:
            return False
        if name in self._overflow:
            self.mismatches.duplicate[name] = "sent more than once"
            return True
        if self._admission.admits(name, tensor):
            return False
        self._overflow.add(name, tensor)
        return True

    def _load_aside(self) -> None:
        """Load what was put aside, now that it can be sorted."""
        if self._overflow is None or not self._overflow.nbytes:
            return
        self._replaying = True
        try:
            with contextlib.closing(
                self._overflow.replay(self.destinations, self._admission.has_begun)
            ) as weights:
                self.load(weights, call_between)
        finally:
            self._replaying = False
        self._spilled = self._overflow.nbytes
        self._overflow.close()

    def copy_by_plan(self, name: str, tensor: torch.Tensor) -> bool:
        """Load a weight by its route, if it has one that fits."""
        tensor_plan = self.completeness.plan_for_tensor(name, tensor)
        if tensor_plan is None:
            return False
        self._trace.note_arrival(name, tensor, tensor_plan.shape)
        self._trace.current = name
        if not self.destinations.took(name, tensor):
            copy_by_plan(self.completeness.without_overwritten_slots(name, tensor_plan), tensor, self._memory)
        self.completeness.note_copied(name, tensor_plan)
        return True

    def take_direct_read(self, direct_read: DirectRead) -> None:
        """Account for weights that were read to where they go, and process the layers that are complete."""
        self._trace.note_direct_read(direct_read)
        self._close_all(self.completeness.note_direct_read(direct_read))

    @contextlib.contextmanager
    def loading(self, last: bool = False) -> Iterator[None]:
        """The model in load format, watched. May be nested; the outermost exit shows the served state
        again, unless ``show`` was called before or all went well and it is the ``last``.
        """
        if self.state is SessionState.LOADING:
            yield
            return
        self._require(SessionState.OPEN)
        stay = self._shown
        self.state = SessionState.LOADING
        with held():
            try:
                with self._context():
                    self.show()
                    with self._trace:
                        yield
                stay |= last
            finally:
                if not stay:
                    self.hide()
                if self.state is SessionState.LOADING:
                    self.state = SessionState.OPEN

    def show(self) -> None:
        """Put the model into load format. It cannot serve until ``hide``."""
        if self._shown:
            return
        if not self._entered:
            before_change(self._record, self)
        self._shown = True
        self._tree = unwrap_tree(self._record)
        if self._entered:
            for stage in (*self._open_stages.values(), *self._late):
                stage.unhide()
            return
        self._entered = True
        self._bystanders = UntouchedLayers(self._record, [stage.group.name for stage in self._stages])
        by_copy_plan, straight = self.completeness.copy_plan is not None, self.policy == "streaming"
        alias_served = straight and self._all_by_copy_plan()
        for stage in self._stages:
            self._open_stages[id(stage)] = stage
            stage.enter(by_copy_plan, False, self._from_served, straight, alias_served)
            self._trace.watch(stage.storages)
            self.completeness.admit(stage)
        served = functools.partial(served_tensors, self._stages, self._bystanders)
        self._trace.protect(served, self._touching)

    def _all_by_copy_plan(self) -> bool:
        """Whether every weight goes by a route, and no loader will look at the model."""
        copy_plan = self.completeness.copy_plan
        return self._expected.planned and copy_plan is not None and not copy_plan.computed

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """To read, load and finish in: no search for garbage where nothing runs but routes and processing.

        What processing leaves in cycles is searched for when memory runs short; see ``memory``. That of a
        device is not watched.
        """
        watched = self._record.target_device.type == "cpu"
        return gc_paused() if watched and self._all_by_copy_plan() else full_gc_paused()

    def hide(self) -> None:
        """Show the served weights; what was loaded so far is kept for the next ``show``."""
        for stage in (*self._open_stages.values(), *self._late):
            if not stage.hidden:
                stage.hide()
        rewrap_tree(self._tree)
        self._tree = []
        self._shown = False

    def show_served_if_idle(self) -> bool:
        """Show all that is served until the next call, if it is served still and this is not in a call."""
        whole = self.state is SessionState.OPEN and not self.committed
        if whole:
            with held():
                self.hide()
        return whole

    def finish(self, check: bool = True) -> ReloadReport:
        """Check that everything came, process what is left, and commit.

        Args:
            check: False takes the weights as they are, for a source that is known to be whole.

        Raises:
            WeightsError: lists all that does not fit; nothing was committed under ``staged``.
            ProcessingError: vLLM's processing raised.

        """
        with held(), full_gc_paused(), self._noting_failure():
            return self._finish(check)

    def _finish(self, check: bool) -> ReloadReport:
        self._require(SessionState.OPEN)
        started = time.perf_counter()
        if self._spoiled is not None:
            raise SessionError(f"This reload cannot be finished, only aborted: {self._spoiled}. {SERVES_OLD}")
        self._load_aside()
        kept, ignored = self.check() if check else ({}, {})
        self.state = SessionState.PROCESSING
        try:
            with self._context():
                self.show()
                self._process_rest()
                self._process_tail()
            if self._bystanders is not None:
                self._bystanders.check(self.source)
            deliver()
            self._wait_for_all_ranks()
            with self._timed("commit"):
                for _, commit in self._staged:
                    self._apply(commit)
                self.state = SessionState.COMMITTED
                self._record.generation = Generation(
                    self._record.generation.version + 1, self.weight_version, self.source
                )
                # Only now: results may be views of one another's memory (W_UV of kv_b_proj's weight).
                for stage, commit in self._staged:
                    stage.release(commit.kept_storages(applied=True))
        finally:
            self.hide()
            if self.state is SessionState.PROCESSING:
                self.state = SessionState.OPEN
        self._seconds["finish"] = time.perf_counter() - started
        self._drop()
        if self.digest is True:
            with self._timed("digest"):
                served_digest(self._record)
        self.report = self._make_report(kept, ignored)
        return self.report

    def _wait_for_all_ranks(self) -> None:
        if self.agree is None:
            return
        self._spoiled = "the ranks did not agree to commit it"
        with self._timed("agree"):
            self.agree(None)
        self._spoiled = None

    def check(self) -> tuple[dict[str, str], dict[str, str]]:
        """Account for every slot; returns (kept, ignored). Raises WeightsError with all offenders."""
        if not self.loaded.count and not self.loaded.written and not self.mismatches:
            raise SourceError(f"{self.source} gave no weights. {SERVES_OLD}")
        kept, ignored = self.account()
        if self.mismatches:
            raise weights_error(self.source, SERVES_OLD, **vars(self.mismatches))
        return kept, ignored

    def account(self) -> tuple[dict[str, str], dict[str, str]]:
        """Like ``check``, but leaves the offenders in ``mismatches``."""
        self.mismatches.missing.clear()
        self.completeness.settle()
        stages = [stage for stage in self._stages if not stage.processed]
        if self.completeness.copy_plan is None and self._entered:
            self._trace.note_new_parameters(self._open_stages.values())
        rule = functools.partial(ignore_rule, self.model, self._record, self._expected.start_shapes)
        return check_slots(stages, self.loaded, self.mismatches, rule, self._expected.was_written)

    def rehearse(self) -> list[str]:
        """Process what is served once more, as if it had just been loaded, and commit nothing.

        Returns the names of the groups that would not come out bit for bit as they are. Ends the session.
        """
        self._require(SessionState.OPEN)
        self.state = SessionState.PROCESSING
        try:
            with self._context():
                self.show()
                for stage in list(self._open_stages.values()):
                    if not stage.group.deferred:
                        self._close(stage)
                self._process_tail()
            return [commit.name for _, commit in self._staged if not commit.changes_nothing()]
        finally:
            self.abort()

    @held()
    def abort(self) -> None:
        """Forget the reload. The model serves what it served before. Harmless when it is over."""
        if self.state is SessionState.COMMITTED:
            self._drop()  # Ctrl-C may have come before the session was done with it
        if self.state in (SessionState.COMMITTED, SessionState.ABORTED):
            return
        if self._bystanders is not None:
            self._bystanders.put_back()
        self._put_back_parameters()
        self.hide()
        self._drop()
        if self._overflow is not None:
            self._overflow.close()
        self.state = SessionState.ABORTED

    # -- taking over model.load_weights -----------------------------------------------------------

    def take_over(self) -> None:
        """From now on the model's ``load_weights`` and its parameters' loaders load into this session."""
        self._require(SessionState.OPEN)
        self.show()
        vllm_api.attach(self.model, "load_weights", self.load)
        for stage in self._stages:
            stage.wrap_loaders(self._watched)

    def _watched(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        """A weight loader that loads into this session when it is called by itself."""

        @functools.wraps(loader)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.loading():
                return loader(*args, **kwargs)

        return watched

    def _hand_back(self) -> None:
        if self.model.__dict__.get("load_weights") == self.load:
            del self.model.__dict__["load_weights"]

    # -- states of the model ----------------------------------------------------------------------

    def _drop(self) -> None:
        self._hand_back()
        for stage in self._stages:
            stage.drop()
        self._stages, self._open_stages, self._late, self._staged = [], {}, [], []
        self._closed = []
        self._trace.forget_model()
        self._bystanders = None
        after_change(self._record, self)
        self._record.pool.settle()

    # -- process and commit -----------------------------------------------------------------------

    def close_complete(self) -> None:
        """Between two weights: process the layers that have everything."""
        recent = self._trace.take_recent()
        self._close_all(self.completeness.complete_after(self._trace.current, recent))

    def _close_all(self, complete: list[StagedGroup]) -> None:
        if not complete or self.whole_model or self.mismatches:
            return
        for stage in complete:
            waits = stage.group.deferred or stage.group.name in self._record.deferred_groups
            if id(stage) in self._open_stages and not waits:
                self._close(stage)

    def _close(self, stage: StagedGroup) -> None:
        """Process one group; keep or commit its result, and show what it serves."""
        stage.unwrap_loaders()
        self._admission.done(stage.group.name)
        self._keep_to_budget(stage)
        with self._untraced():
            self._process(stage)
            for storage in stage.storages:
                storage.closed = True
            if stage.group.late:
                self._late.append(stage)
                del self._open_stages[id(stage)]
                self._note_complete(stage)
                return
            stage.take_result()
            del self._open_stages[id(stage)]
            layers = stage.layers if self.completeness.copy_plan is None else []
            self._note_complete(stage)
            self._keep(stage)
            self._closed += [(name, layer, dict(layer._parameters)) for name, layer in layers]

    def _note_complete(self, stage: StagedGroup) -> None:
        """Keep the model's loader from what a complete layer holds now, if that is not what was loaded."""
        as_loaded = self.policy == "streaming" and stage.group.plain
        if self.completeness.copy_plan is not None or as_loaded or not stage.group.tensors:
            return
        for name, layer in stage.layers:
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    self._trace.note_complete(parameter, f"{name}.{key}", stage.group.tensors[0].name)

    def _put_back_parameters(self) -> list[str]:
        """Give layers that were complete the parameters they had, should a loader have given them others.

        Returns the names of those layers.
        """
        changed = []
        for name, layer, parameters in self._closed:
            now = layer._parameters
            if now.keys() != parameters.keys() or any(now[key] is not parameters[key] for key in now):
                now.clear()
                now.update(parameters)
                changed.append(name)
        return changed

    def _process(self, stage: StagedGroup) -> None:
        self._spoiled = f"processing {stage.group.name or 'the model'} did not end well"
        gave_way = False
        try:
            with self._timed("process"):
                gave_way = self._release_native_memory(stage)
                original = original_process_weights()
                process_stage(stage, self._record, original, *self._watch())
        finally:
            if gave_way or stage.overwritten or stage.final_storages():
                self.committed.add(stage.group.name)
        self._spoiled = None

    def _release_native_memory(self, stage: StagedGroup) -> bool:
        """Release the native memory of a layer that is too large for the budget twice, if it may be gone."""
        if self.policy != "streaming" or stage.group.passed_over or stage.group.nbytes <= BESIDE:
            return False
        return release_native_memory(stage.made_by_processing(), self._record.handles)

    def _watch(self) -> tuple[NativeWatch, ReusableOutputs]:
        """What watches processing, begun by the first layer: to begin takes longer than some layers do."""
        if self._watched_by is None:
            device = self._record.target_device
            noted = watching_native(device, self._record.handles, self.digest is not False)
            in_place = self.policy == "streaming" and device.type == "cpu"
            self._watching.callback(setattr, self, "_watched_by", None)
            watch = self._watching.enter_context
            self._watched_by = watch(noted), watch(reusing_served_outputs(in_place))
            self._watched_by[0].paused = True
        return self._watched_by

    def _keep_to_budget(self, stage: StagedGroup) -> None:
        """Before a layer is processed: make the heap give back what it does not use, if it grew too much.

        Small ones are looked at together; not at all where processing leaves everything where it is.
        """
        if stage.group.plain:
            return
        nbytes = stage.group.nbytes
        self._unseen += nbytes
        if self._unseen < SEVERAL:
            return
        self._unseen = 0
        needed = max(nbytes, min(4 * nbytes, PASSING))
        keep_within(self._resident + self._prepared + self._largest + BUDGET, needed)

    def _keep(self, stage: StagedGroup) -> None:
        """Commit a result at once or put it aside; staging that is not part of it is given back."""
        commit = plan_commit(stage)
        if self.policy == "streaming":
            with self._timed("commit"):
                self._apply(commit)
            for storage in self._let_go(stage, commit.kept_storages(applied=True)):
                storage.let_go()
            stage.drop()
            commit.forget()
            return
        self._gauge.add(commit.nbytes_beside(stage))
        self._admission.results += commit.nbytes_beside(stage)
        for storage in self._let_go(stage, commit.kept_storages(applied=False)):
            storage.let_go()
        self._admission.results += sum(storage.nbytes for storage in stage.storages if storage.materialised)
        self._prepared += stage.group.nbytes
        self._staged.append((stage, commit))

    def _let_go(self, stage: StagedGroup, keep: set[int]) -> list[StagedStorage]:
        """Take from a group the staging that no result needs. Returns what the pool may have."""
        if self.completeness.copy_plan is None:
            stage.release(keep)
            return []
        gone = stage.let_go(keep)
        for storage in gone:
            self._trace.unwatch(storage)
        return gone

    def _apply(self, commit: Commit) -> None:
        self._moved += [path for _, _, path in commit.moves]
        try:
            commit.apply()
        finally:
            if commit.begun:
                self.committed.add(commit.name)
        self._record.native[commit.name] = commit.native
        for _, replaced in commit.trades:
            forget_handles(replaced, self._record.handles)

    def _process_rest(self) -> None:
        for stage in list(self._open_stages.values()):
            if stage.group.deferred:
                continue
            if stage.touched or stage.group.effect:
                self._close(stage)
            else:
                self._leave(stage)

    def _leave(self, stage: StagedGroup) -> None:
        stage.served.show()
        del self._open_stages[id(stage)]
        stage.drop()

    def _process_tail(self) -> None:
        """Attention layers and the model's own hook, with every layer showing its new values."""
        shown = [stage for stage, _ in self._staged if stage.result is not None]
        deferred = list(self._open_stages.values())
        done: list[StagedGroup] = []
        try:
            for stage in shown:
                stage.result.show()  # type: ignore[union-attr]
            for stage in deferred:
                stage.unwrap_loaders()
                self._process(stage)
            with self._timed("process"):
                process_tail(self.model, self._record, original_process_weights())
            done = deferred + self._late
        finally:
            for stage in shown:
                stage.served.show()
        for stage in done:
            stage.take_result()
            self._open_stages.pop(id(stage), None)
            self._late = [late for late in self._late if late is not stage]
        for stage in done:
            self._keep(stage)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.failed = f"{type(error).__name__}: {error}"
            if isinstance(error, LateLoaderError):
                self._spoiled = "the model's loader came back to a layer that was complete"
            raise
        self.failed = None

    # -- small things -----------------------------------------------------------------------------

    def _make_report(self, kept: dict[str, str], ignored: dict[str, str]) -> ReloadReport:
        seconds = dict(self._seconds)
        seconds["load"] = max(0.0, seconds.get("load", 0.0) - self._inside_load)
        seconds["total"] = time.perf_counter() - self._started
        return ReloadReport(
            source=self.source,
            policy=self.policy,
            tensors=self.loaded.count,
            nbytes=self.loaded.nbytes,
            replayed=self.completeness.replayed,
            computed=self.completeness.computed,
            layers=len(self.committed),
            kept=kept,
            ignored=ignored,
            moved=tuple(self._moved),
            staging_bytes=self._gauge.peak,
            seconds=seconds,
            version=self._record.generation.version,
            weight_version=self.weight_version,
            digest=self._record.generation.digest,
            spilled_bytes=self._spilled,
        )

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        config = self._record.model_config
        with (
            vllm_api.loading_context(self._record.vllm_config, getattr(config, "dtype", None)),
            contextlib.ExitStack() as self._watching,
        ):
            yield

    def _untraced(self) -> contextlib.AbstractContextManager[object]:
        if not torch._C._len_torch_dispatch_stack():
            return contextlib.nullcontext()
        return torch.utils._python_dispatch._disable_current_modes()

    def _timed(self, stage: str) -> _Timed:
        return _Timed(stage, self._timing, self._note_time)

    def _note_time(self, stage: str, spent: float) -> None:
        self._seconds[stage] += spent
        if self._timing[-1:] == ["load"]:
            self._inside_load += spent

    def _require(self, state: SessionState) -> None:
        if self.state is not state:
            raise SessionError(
                f"This needs a session that is {state.value}; it is {self.state.value}. "
                "Make a new ReloadSession for the next reload."
            )


_original: list[ProcessWeights] = []


def use_process_weights(original: ProcessWeights | None) -> None:
    """Tell the session which function is vLLM's own PWAL (the plugin patches the name)."""
    _original[:] = [] if original is None else [original]


def original_process_weights() -> ProcessWeights:
    """vLLM's whole-model ``process_weights_after_loading``, unpatched."""
    if _original:
        return _original[0]
    found: ProcessWeights = vllm_api.get(vllm_api.LOADER_UTILS, "process_weights_after_loading")
    return found


def _note_touched(committed: set[str], completeness: Completeness, storage: StagedStorage) -> None:
    """Served memory is about to be written to. No method, so that a session is not held by what it holds."""
    committed.add(completeness.group_of(storage.primary.name))
