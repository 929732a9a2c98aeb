"""One reload of one model, from its first weight to its commit.

    with ReloadSession(model, source="step 12") as session:
        session.load(weights)        # any number of times
        report = session.finish()

Leaving the block without ``finish`` aborts: the model serves what it served before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

import torch
from torch import nn

from ..commit.strategies import StrategyName
from ..device.default_device import cpu_is_default
from ..device.gc_pause import full_gc_paused, gc_paused
from ..device.ops import ops_for
from ..errors import SERVES_OLD, LateLoaderError, SessionError
from ..interrupts import call_out, held
from ..load.overflow import Overflow
from ..load.stream import Fetching
from ..options import Wanted
from ..plan.arrivals import Loaded
from ..plan.known_checkpoint import KnownCheckpoint
from ..plan.mismatches import Mismatches
from ..report import ReloadReport
from .dispatch import untraced
from .engine_state import opened_by, state_of
from .finish import process_and_commit
from .screening import Inspect
from .session_parts import SessionOptions, SessionParts, wire
from .session_report import ReportFacts, make_report
from .session_state import SessionState
from .takeover import Takeover

Agree = Callable[[BaseException | None], None]


class ReloadSession:
    """One reload of one model.

    Between two calls the live model shows exactly what it serves. Tensors that are passed in belong to the
    caller, who may overwrite them when the next one is asked for, or when the call returns.

    On a device each call works on the current stream of its thread, which may be another one than in the call
    before: it waits for the work of the earlier calls. Tensors have to be ready on the current stream. Copies
    from a tensor are over when the next one is asked for and when the call returns; other work may still be
    queued then. ``finish`` synchronizes the device before the first write to served memory and after the
    last one.

    Args:
        model: a model whose load format was recorded.
        source: what to call the weights in messages and in the report.
        policy: name of the commit strategy, see ``commit.strategies``: ``staged`` prepares all groups and
            then commits them; ``streaming`` commits each group when it is done and needs a caller with a
            rollback source.
        whole_model: process no group before all weights are loaded (for loaders that revisit layers).
        expected: what is known of the weights before they come.
        overflow: puts weights aside that come while too many groups wait for the rest of theirs.
        inspect: sees every weight as it comes; a text that it returns says why the weight is refused.
        from_served: groups start from the values they serve, where their load format allows it.
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
        policy: StrategyName = "staged",
        whole_model: bool = False,
        expected: KnownCheckpoint | None = None,
        overflow: Overflow | None = None,
        inspect: Inspect | None = None,
        from_served: bool = False,
        agree: Agree | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.state = SessionState.READY
        self.report: ReloadReport | None = None
        self.failed: str | None = None
        """What the last ``load`` or ``finish`` that raised said."""
        self.weight_version: str | None = None
        """The caller's name for these weights, from the commit on."""
        self.facts = ReportFacts()
        """What its caller tells the report."""
        self._opened_by = opened_by()
        self.agree = agree
        options = SessionOptions(policy, whole_model, expected, overflow, inspect, from_served)
        self._parts = wire(model, state_of(model), options)
        self._spoiled: str | None = None
        """Why this session can only be aborted, if processing is not the reason."""
        self._takeover: Takeover | None = None

    # -- what callers ask --------------------------------------------------------------------------

    gives_way = False
    """Whoever opened it says when it is over."""

    def describe(self) -> str:
        """Source, who opened it, how many weights arrived."""
        return f"{self.source}, {self._opened_by}, {self.loaded.count} weights so far"

    @property
    def loaded(self) -> Loaded:
        """What the stream has brought so far."""
        return self._parts.trace.loaded

    @property
    def mismatches(self) -> Mismatches:
        """Everything that does not fit, so far."""
        return self._parts.trace.mismatches

    @property
    def parts(self) -> SessionParts:
        """The collaborators; for callers inside the package."""
        return self._parts

    @property
    def digest(self) -> Wanted:
        """Whether to hash what the kernels read; see ``options.Wanted``."""
        return self._parts.processing.digest

    @digest.setter
    def digest(self, wanted: Wanted) -> None:
        self._parts.processing.digest = wanted

    @property
    def touched_groups(self) -> set[str]:
        """Names of groups whose served values were changed, or may have been."""
        return self._parts.log.groups

    # -- life --------------------------------------------------------------------------------------

    def __enter__(self) -> ReloadSession:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def open(self) -> None:
        """Prepare to load."""
        self._require(SessionState.READY)
        state = self._parts.state
        state.pool.reserve(state.record.largest)
        self.state = SessionState.OPEN

    def load(
        self, weights: Iterable[tuple[str, torch.Tensor]], fetching: Fetching = call_out
    ) -> set[str] | None:
        """Load some of the weights; may be called any number of times.

        Args:
            weights: (checkpoint name, tensor) pairs.
            fetching: asks for the next weight; as it is, Ctrl-C gets through to an iterator.

        Returns:
            The names of the parameters they went to, as the model's ``load_weights`` does; None if that took
            them and returns none.

        """
        return self._load(weights, fetching, last=False)

    def load_one(self, name: str, tensor: torch.Tensor) -> bool:
        """Load one weight by the copy plan, without the context that a loader and processing need: that costs
        more than copying a small weight does.

        Returns:
            False where it has to come through ``load``; then nothing has changed.

        """
        parts = self._parts
        if self.state is not SessionState.OPEN or not parts.load_format.entered or parts.intake.needs_view:
            return False
        parts.state.refuse_while_asleep("load")
        if torch.is_inference_mode_enabled() or not cpu_is_default():
            return False
        with parts.state.in_a_call():
            parts.order.enter()
            with torch.no_grad(), untraced():
                complete = parts.intake.load_planned(name, tensor)
            if complete:
                with held(), full_gc_paused(), self._noting_failure(), self.loading(show=False):
                    parts.intake.close_groups(complete)
        return complete is not None

    def load_last(self, weights: Iterable[tuple[str, torch.Tensor]], fetching: Fetching = call_out) -> None:
        """Like ``load``, but leaves the model in load format because ``finish`` follows at once."""
        self._load(weights, fetching, last=True)

    def _load(
        self, weights: Iterable[tuple[str, torch.Tensor]], fetching: Fetching, last: bool
    ) -> set[str] | None:
        self._parts.state.refuse_while_asleep("load")
        self.mismatches.missing.clear()  # of a finish that was too early
        show = last or self._parts.intake.needs_view
        timed = self._parts.clock.timed("load")
        with held(), full_gc_paused(), self._noting_failure(), timed, self.loading(last, show):
            return self._parts.intake.load(weights, fetching)

    @contextlib.contextmanager
    def loading(self, last: bool = False, show: bool = True) -> Iterator[None]:
        """A call that loads, with vLLM's loading context and the watch over the model's loader. May be
        nested.

        Args:
            last: leave the load format on the model if all went well, because ``finish`` follows.
            show: show the load format from the beginning; else only when the model's own loader is needed.

        """
        stay = False
        with held(), self._parts.state.in_a_call():
            if self.state is SessionState.LOADING:
                yield
                return
            self._require(SessionState.OPEN)
            self.state = SessionState.LOADING
            self._parts.order.enter()
            try:
                with self._parts.processing.context():
                    self._parts.load_format.enter(self, show)
                    with self._parts.trace:
                        yield
                stay = last
            finally:
                if not stay:
                    self._parts.view.hide()
                self.state = SessionState.OPEN

    def take_over(self) -> None:
        """From now on ``model.load_weights`` and the loaders of its parameters load into this session."""
        self._require(SessionState.OPEN)
        self._parts.load_format.enter(self, show=False)
        late = self._parts.trace.late
        self._takeover = Takeover(self.model, self.load, self.loading, late)
        self._parts.pipeline.takeover = self._takeover
        self._takeover.begin(self._parts.view.groups)

    def show_served_if_idle(self) -> bool:
        """Whether all that is served is in its place and stays there until the next call."""
        return self.state is SessionState.OPEN and not self.touched_groups

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """To read, load and finish in: no garbage collection where nothing runs but copies and processing.

        What processing leaves in cycles is collected when memory runs short, see ``device.host_memory``;
        memory of a device is not watched there.
        """
        may_pause = ops_for(self._parts.record.target_device).pauses_gc
        return gc_paused() if may_pause and self._parts.all_by_copy_plan else full_gc_paused()

    # -- end ---------------------------------------------------------------------------------------

    def finish(self, check: bool = True) -> ReloadReport:
        """Check that everything came, process what is left, and commit.

        Args:
            check: False takes the weights as they are, for a source that is known to be whole.

        Raises:
            WeightsError: lists all that does not fit; the session stays open.
            ProcessingError: vLLM's processing raised; the session can only be aborted.
            SessionError: the engine sleeps; or the session can only be aborted, because something failed.

        """
        self._parts.state.refuse_while_asleep("finish")
        with held(), self._parts.state.in_a_call(), full_gc_paused(), self._noting_failure():
            self._require(SessionState.OPEN)
            if reason := self._spoiled or self._parts.processing.spoiled:
                raise SessionError(f"This reload cannot be finished, only aborted: {reason}. {SERVES_OLD}")
            started = time.perf_counter()
            self._parts.order.enter()
            self._parts.screening.load_aside(self.load, self._parts.intake.destinations)
            self._parts.screening.check_tied_head()
            kept, ignored = self._parts.accounting.check(self.source) if check else ({}, {})
            self._process_and_commit()
            self._parts.clock.add("finish", time.perf_counter() - started)
            self._drop()
            if self.digest is True:
                with self._parts.clock.timed("digest"):
                    self._parts.state.served_digest()
            self.report = make_report(self, kept, ignored)
            return self.report

    def _process_and_commit(self) -> None:
        if self._takeover is not None:
            self._takeover.end()
        try:
            process_and_commit(self, self._parts, self._wait_for_all_ranks)
        finally:
            self._parts.view.hide()
            if self.state is not SessionState.COMMITTED:
                self.state = SessionState.OPEN

    def _wait_for_all_ranks(self) -> None:
        if self.agree is None:
            return
        self._spoiled = "the ranks did not agree to commit it"
        with self._parts.clock.timed("agree"):
            self.agree(None)
        self._spoiled = None

    @held()
    def abort(self) -> None:
        """Forget the reload. Harmless when it is over.

        The model serves what it served before, unless groups were committed one by one: the session is BROKEN
        then, and its caller brings the old weights back or says that the engine cannot serve.
        """
        if self.state is SessionState.COMMITTED:
            self._drop()  # Ctrl-C may have come before the session was done with it
        if self.state in (SessionState.COMMITTED, SessionState.ABORTED, SessionState.BROKEN):
            return
        self._parts.load_format.put_back()
        with contextlib.suppress(RuntimeError):  # of the device: the next operation raises it again
            self._parts.order.settle()
        self._drop()
        self._parts.screening.close()
        self.state = SessionState.BROKEN if self.touched_groups else SessionState.ABORTED

    def _drop(self) -> None:
        with contextlib.suppress(RuntimeError):  # of the device: the next operation raises it again
            self._parts.intake.close()
        if self._takeover is not None:
            self._takeover.end()
            self._takeover = None
        self._parts.load_format.leave(self)
        self._parts.state.pool.settle()

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

    def _require(self, state: SessionState) -> None:
        if self.state is not state:
            raise SessionError(
                f"This needs a session that is {state.value}; it is {self.state.value}. "
                "Make a new ReloadSession for the next reload."
            )
