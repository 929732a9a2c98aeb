"""What one model serves, and what is under way with it.

One object a model, so that two engines of a process never answer for one another. Everybody may read it; it
is written by the methods here only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import nn

from .. import vllm_api
from ..checkpoint import Rereadable, Source, close_source, overlaid_sources
from ..device.host_memory import HostPool
from ..digest import digest
from ..errors import SERVES_OLD, EngineBrokenError, SessionError
from ..plan.plan_cache import PlanCache
from ..process.native_handles import Handles
from ..ranks.votes import Vote
from ..record.generation import Generation
from ..record.model_record import STATE_ATTRIBUTE, ModelRecord, complete_record_of
from ..report import ReloadReport
from .start import StartedFrom

logger = logging.getLogger("vllm.reload_plugin")

PARKED = (
    "its weights are parked in host memory. Bring them back first: reload_plugin.unpark(llm), or "
    "reload-plugin unpark URL."
)


class OpenUpdate(Protocol):
    """An update that spans several calls: a session, or a push through ``model.load_weights``."""

    gives_way: bool
    """Whether another reload may begin, which drops this one: nobody said that it is to be finished."""
    failed: str | None
    """What its last call that raised said."""

    def describe(self) -> str:
        """Source, who opened it, how many weights arrived."""

    def abort(self) -> None:
        """Drop what was loaded."""


class Parked(Protocol):
    """Weights that are in host memory until they are brought back to their device."""

    def note_commit(self) -> None:
        """A reload wrote to them."""

    def settle(self) -> None:
        """A call is over: what a reload left on the device goes to the host too."""


class EngineState:
    """The state of one recorded model.

    Args:
        record: of the model, complete.
        handles: native handles that its start made, with the digests of what they were made of.

    """

    def __init__(self, record: ModelRecord, handles: Handles | None = None) -> None:
        self.record = record
        self.plans = PlanCache()
        self.pool = HostPool()
        """Memory for staging, kept from reload to reload."""
        self.handles: Handles = {} if handles is None else handles
        self.native: dict[str, list[torch.Tensor]] = {}
        """Group name -> memory that the group's native handles point into."""
        self.deferred_groups = set(record.groups_with_added_parameters)
        """Names of groups that stay open until all weights have come: a loader made a parameter for one, of
        which its load format tells nothing, or comes back to its parameters when others have come."""
        self.enters_collectives = False
        """Whether processing was seen to enter collectives: all ranks process layers in one order then."""
        self.start = StartedFrom()
        """What is known of the checkpoint the engine started with."""
        self.generation = Generation()
        self.update: OpenUpdate | None = None
        """The open update, which spans several calls."""
        self.broken: str | None = None
        """Why nothing can be served: the model holds a mixture of two generations, or its weights are
        lost."""
        self.rollback_source: Rereadable | None = None
        """Gives the served weights again, if anything does."""
        self.vote: Vote | None = None
        """This rank's vote in the reload that is under way, where several ranks hold the model."""
        self.asleep = False
        """Whether the memory of the weights is given away by ``sleep``, so that nobody may touch it."""
        self.parked: Parked | None = None
        """The served weights, while they are in host memory and nothing serves."""
        self.outcome = Outcome()
        self._reloading = _OneAtATime()

    # -- what is served ----------------------------------------------------------------------------

    def commit(self, weight_version: str | None, source: str, whole: bool = True) -> None:
        """New weights are served from now on. ``whole``: all of them, so that a broken model is healed."""
        before = self.generation
        known, lost = whole or before.known, before.lost and not whole
        self.generation = Generation(before.version + 1, weight_version, source, known=known, lost=lost)
        if whole:
            self.broken = None
        if self.parked is not None:
            self.parked.note_commit()

    def rolled_back_to(self, generation: Generation) -> None:
        """The old weights were read again: they are served under the version they had."""
        self.generation = generation

    def break_(self, reason: str) -> EngineBrokenError:
        """The model holds a mixture. Returns the error to raise."""
        self.broken = reason
        return EngineBrokenError(
            f"The engine holds a mixture of two generations and refuses to serve: {reason}. "
            "Reload a complete checkpoint to heal it."
        )

    def mark_lost(self, reason: str) -> None:
        """The served weights are gone: nothing is served until a reload heals the model. Their digest is
        forgotten and their rollback source is given back, so that nothing is built upon them.
        """
        self.broken = reason
        self.generation = self.generation.as_lost()
        self.replace_rollback_source(None)

    def mark_unknown(self, reason: str, heals: bool = False) -> None:
        """Served weights were written by somebody else: which ones, nobody here knows.

        Version and source move on, digest and rollback source are gone, and partial updates are refused until
        a whole reload.

        Args:
            reason: who wrote them, for ``status``.
            heals: whether all of them were, so that a model whose weights were lost serves again.

        """
        lost = self.generation.lost and not heals
        self.generation = Generation(self.generation.version + 1, None, reason, known=False, lost=lost)
        self.replace_rollback_source(None)
        if heals:
            self.broken = None

    def fall_asleep(self) -> None:
        """The memory of the weights was given away, to be brought back or not. Parked weights stay."""
        self.asleep = self.parked is None

    def wake_up(self) -> None:
        """The memory of the weights can be read again."""
        self.asleep = False

    def park(self, parked: Parked) -> None:
        """The weights are in host memory from now on."""
        self.parked = parked

    def unpark(self) -> None:
        """The weights are on their device again."""
        self.parked = None

    def replace_rollback_source(self, source: Rereadable | None) -> None:
        """The served weights come from ``source`` now; what the old one holds and the new one does not is
        given back.
        """
        old, self.rollback_source = self.rollback_source, source
        kept = {id(layer) for layer in overlaid_sources(source)}
        for layer in overlaid_sources(old):
            if id(layer) not in kept:
                close_source(layer)

    def absorb_update(self, source: Source) -> None:
        """The rollback source is the same weights in fewer layers; whoever joined them gave the rest back."""
        self.rollback_source = source

    def before_forward_pass(self) -> None:
        """Called before every forward pass of the model.

        Raises:
            EngineBrokenError: the model holds a mixture of two generations, or has lost its weights.
            SessionError: the engine sleeps, or its weights are parked; or see ``refuse_inside_a_call``.

        """
        self.refuse_requests()
        self.refuse_inside_a_call()

    def refuse_requests(self) -> None:
        """Nothing is served in some states, whoever asks.

        Raises:
            EngineBrokenError: the model holds a mixture of two generations, or has lost its weights.
            SessionError: the engine sleeps, or its weights are parked.

        """
        self.refuse_while_asleep("generate")
        if self.broken is not None:
            raise EngineBrokenError(
                f"The engine does not serve: {self.broken}. Reload a complete checkpoint to heal it."
            )
        if self.parked is not None:
            raise SessionError(f"The engine does not serve: {PARKED}")

    def refuse_while_asleep(self, what: str) -> None:
        """Raises SessionError while the memory of the weights is away. ``what``: what cannot be done then."""
        if self.asleep:
            raise SessionError(
                'The engine sleeps, and its weights are not in memory. Wake it up first (tags=["weights"] is '
                f"enough), then {what}."
            )

    def refuse_inside_a_call(self) -> None:
        """Wait for the reload of another thread.

        Raises:
            SessionError: this is called from within a reload, whose iterator of weights runs the engine, say.

        """
        if self._reloading.wait_unless_mine():
            raise SessionError(
                "The engine cannot serve inside a call that reloads its weights: the weights that are passed "
                "in must not be made by this engine. Collect them first."
            )

    def served_digest(self) -> str | None:
        """The digest of what is served, made now unless it was before, and remembered with the generation.

        None, beside the cases of ``digest_of``, where a reload is at work or nothing is served.
        """
        if self.broken is not None:
            return None
        # Asleep: the memory is away, and reading it would end the process. Unknown: native handles may have
        # been made of other weights than those that they were hashed with.
        # Parked: host memory hashes to something else than the device's.
        if self.asleep or self.parked is not None or not self.generation.known:
            return self.generation.digest
        with self.record.changes.blocked() as all_there:
            if self.generation.digest is None and all_there:
                made = digest.digest_of(self.record, self.handles, forget=not self.record.changes)
                self.generation = self.generation.with_digest(made)
            return self.generation.digest

    # -- one reload at a time ----------------------------------------------------------------------

    @contextlib.contextmanager
    def in_a_call(self) -> Iterator[None]:
        """Around every call that may change the model.

        Raises:
            SessionError: another thread is in such a call.

        """
        with self._reloading.entered():
            try:
                yield
            finally:
                if self.parked is not None and self._reloading.is_outermost:
                    self.parked.settle()

    def open(self, update: OpenUpdate) -> None:
        """An update that spans several calls begins."""
        self.update = update

    def close(self, update: OpenUpdate) -> None:
        """The update is over. Harmless when another one is open."""
        if self.update is update:
            self.update = None

    def refuse_while_update_open(self) -> None:
        """Raises SessionError while an update is open and well. One that failed, or that gives way, is
        dropped for the next.
        """
        update = self.update
        if update is None:
            return
        if update.failed or update.gives_way:
            if not update.failed:
                logger.warning("Dropped for another reload: %s.", update.describe())
            self.abandon_update()
            return
        raise SessionError(
            f"A weight update is open: {update.describe()}. {SERVES_OLD} Finish it or abort it "
            "(abort_weight_update) first."
        )

    def abandon_update(self) -> bool:
        """End the open update; its weights were never served. Says whether one was open."""
        update, self.update = self.update, None
        if update is not None:
            update.abort()
        return update is not None

    # -- small things ------------------------------------------------------------------------------

    def defer_groups_of(self, parameters: Iterable[str]) -> None:
        """A loader came back to these parameters: keep their groups open to the end from now on."""
        self.deferred_groups.update(self.record.group_with(parameter).name for parameter in parameters)


class Outcome:
    """How the last reloads ended, for ``status``."""

    def __init__(self) -> None:
        self.report: ReloadReport | None = None
        """Of the last good reload, without its long lists."""
        self.error: str | None = None
        """What the last reload that failed said; None once one succeeded."""
        self.kept: dict[str, str] = {}
        """What the last good reload kept, as in its report."""
        self.has_cross_group_effects = False
        """Whether processing some groups alone was seen to change others, so that partial updates load
        all."""

    def failed(self, error: BaseException) -> None:
        """A reload failed."""
        self.error = f"{type(error).__name__}: {error}"

    def succeeded(self, report: ReloadReport) -> None:
        """A reload was committed."""
        self.error = None
        self.report = report.model_copy(update={"kept": {}, "ignored": {}})

    def note_caches(self, outcomes: dict[str, str]) -> None:
        """Put into the last report what became of some caches after the reload."""
        if self.report is not None:
            self.report = self.report.model_copy(update={"caches": self.report.caches | outcomes})


def opened_by() -> str:
    """Who opens an update: this thread of this process."""
    return f"opened by thread {threading.current_thread().name} of process {os.getpid()}"


class _OneAtATime:
    """A lock that refuses another thread instead of keeping it waiting."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: tuple[int, str] | None = None
        self._depth = 0

    @property
    def is_outermost(self) -> bool:
        """Whether this thread, which holds it, entered it once."""
        return self._depth == 1

    def wait_unless_mine(self) -> bool:
        """Wait until no other thread holds it. Says whether this one does."""
        with self._lock:
            return self._depth > 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            holder = self._holder
            whose = "another thread" if holder is None else f"thread {holder[1]}"
            raise SessionError(
                f"Another reload of this model is under way in {whose}. {SERVES_OLD} Reload again when it is "
                "over."
            )
        self._depth += 1
        self._holder = threading.get_ident(), threading.current_thread().name
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._holder = None
            self._lock.release()


def state_of(model: nn.Module) -> EngineState:
    """The state of a recorded model.

    Raises:
        NotRecordedError: the model was built without the plugin, or its start is not over.

    """
    found = model.__dict__.get(STATE_ATTRIBUTE)
    if isinstance(found, EngineState):
        return found
    return begin_state(model, complete_record_of(model))


def begin_state(model: nn.Module, record: ModelRecord, handles: Handles | None = None) -> EngineState:
    """Make the state of a model whose start is over; it is freed together with the model."""
    state = EngineState(record, handles)
    vllm_api.attach(model, STATE_ATTRIBUTE, state)
    return state
