"""Updates in several calls: a block, vLLM's layerwise start and finish, and abort; in between the engine
serves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from ..device.host_memory import settle_heap
from ..errors import SERVES_OLD, SessionError
from ..interrupts import held, let_through
from ..options import ReloadOptions, Together, options, road_options
from ..ranks.joint import together_in
from ..report import ReloadReport
from .engine_state import EngineState, state_of
from .known import known_checkpoint, learn_copy_plan, session_for
from .misplaced_weights import refuse_misplaced_weights
from .policies import policy_for_iterator, strategy_between_calls
from .push_intake import GatheringIntake, gathering_intake, inspect_finite
from .reload_call import as_reload_errors, reload_call, with_all_ranks
from .rollback import after_commit, rollback_on_failure
from .session import ReloadSession


class ChunkedUpdate(Protocol):
    """An update between its start and its finish."""

    report: ReloadReport | None
    """Once it was committed."""

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Load some of the weights."""


class GatheredUpdate:
    """An update whose weights go to a file first, because two copies of the model do not fit into memory.

    They are read from there when it is finished, layer by layer. Weights that come without a name, through
    the ``weight_loader`` of a parameter, cannot be gathered: that writes to the served parameter.
    """

    gives_way = False
    failed: str | None = None

    def __init__(self, source: str, intake: GatheringIntake) -> None:
        self.source, self.intake = source, intake
        self.count = 0
        self.report: ReloadReport | None = None

    def describe(self) -> str:
        """Source, who opened it, how many weights arrived."""
        return f"{self.source}, {self.intake.opened_by}, {self.count} weights so far"

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Put some of the weights into the file."""

        def counted() -> Iterator[Any]:
            for item in weights:
                self.count += 1
                yield item
                del item  # the caller may overwrite the tensor from now on

        try:
            return self.intake.load(counted())
        except BaseException as error:
            self.failed = f"{type(error).__name__}: {error}"
            raise

    def abort(self) -> None:
        """Give the disk space back."""
        self.intake.abort()


@contextlib.contextmanager
def restore_for_reloading(model: nn.Module, **how: Any) -> Iterator[ChunkedUpdate]:
    """Inside the block ``model.load_weights`` reloads: any number of calls, one commit at the end.

    Between two calls the model shows and serves the old weights, so that it may generate inside the block.
    Loaders of its parameters (``parameter.weight_loader``) load into the reload too. Leaving the block
    normally checks that everything came, processes and commits; leaving it by an exception drops what was
    loaded.

    Args:
        model: of a running engine, recorded by the plugin.
        **how: ``policy`` (``auto``, ``host`` or ``spill``), ``check_finite``, ``keep_load_format`` and
            ``spill_dir``; see ``reload_weights``. Else what ``RELOAD_PLUGIN_OPTIONS`` says.

    Raises:
        ReloadError: an option is not valid.
        SessionError: a weight update is open, another block among them.
        WeightsError: at the end of the block, listing all that does not fit.

    """
    chosen = options(**how, digest="later") if how else road_options().model_copy(update={"digest": True})
    with reload_call(model, spans_calls=True) as state:
        update = _open_update(model, state, "model.load_weights", chosen)
        with _rollback(model, state, update), _aborted_on_failure(update):
            try:
                with let_through():
                    yield update
            finally:
                state.close(update)
            report = _finish_update(state, update)
        state.outcome.succeeded(report)
        settle_heap()


@held()
def open_layerwise(model: nn.Module) -> None:
    """vLLM's ``initialize_layerwise_reload``: from now on ``model.load_weights`` loads into an update.

    Raises:
        ReloadError: ``RELOAD_PLUGIN_OPTIONS`` is not valid.
        SessionError: the engine sleeps; or another update is open, it says whose.

    """
    state = state_of(model)
    with state.in_a_call():
        refuse_misplaced_weights(state)
        state.refuse_while_asleep("start an update")
        state.refuse_while_update_open()
        _open_update(model, state, "a weight update", road_options())


_finishing_with: ContextVar[Together | None] = ContextVar("_finishing_with", default=None)


@contextlib.contextmanager
def finishing_together(together: Any) -> Iterator[None]:
    """Within, updates of this thread that are finished commit with those of other engines, or not at all.

    Args:
        together: the option of that name, see ``ranks.joint``; not yet checked.

    Raises:
        ReloadError: it is not valid; the update stays open.

    """
    token = _finishing_with.set(together_in(together))
    try:
        yield
    finally:
        _finishing_with.reset(token)


@held()
def finish_layerwise(model: nn.Module) -> ReloadReport:
    """vLLM's ``finalize_layerwise_reload``: check, process, commit.

    Raises:
        SessionError: no update is open.
        UnsupportedError: experts were rearranged since it was opened.
        WeightsError: the update stays open: send what is missing and finish again, or abort it.
        RanksDisagreeError: another rank, or another engine under ``finishing_together``, is not ready; the
            update stays open.

    """
    state = state_of(model)
    with state.in_a_call():
        try:
            with with_all_ranks(state, _finishing_with.get()), as_reload_errors(state):
                update = state.update
                if not isinstance(update, (ReloadSession, GatheredUpdate)):
                    raise SessionError(
                        f"No weight update is open: none was started, or it failed. {SERVES_OLD}"
                    )
                with _rollback(model, state, update):
                    report = _finish_update(state, update)
        except BaseException as error:
            state.outcome.failed(error)
            raise
        state.close(update)
        state.outcome.succeeded(report)
    settle_heap()
    return report


@held()
def abort_weight_update(model: nn.Module) -> bool:
    """End the open weight update; the engine serves what it served before. Says whether one was open."""
    state = state_of(model)
    with state.in_a_call():
        return state.abandon_update()


def abandon_updates(states: Iterable[EngineState]) -> bool:
    """End the open updates of some models (a draft model has its own). Says whether one was open."""
    return sum(state.abandon_update() for state in states) > 0  # every one, not the first alone


def _open_update(
    model: nn.Module, state: EngineState, source: str, chosen: ReloadOptions
) -> ReloadSession | GatheredUpdate:
    """Open an update for weights that nobody lists beforehand."""
    policy = policy_for_iterator(model, state, chosen)
    if policy.rollback == "spill" or chosen.keep_load_format is not None:
        gathered = GatheredUpdate(source, gathering_intake(model, state, source, chosen))
        state.open(gathered)
        return gathered
    learn_copy_plan(model, state)
    inspect = inspect_finite if chosen.check_finite else None
    known = known_checkpoint(model, state)
    strategy = strategy_between_calls(state, policy)
    session = session_for(model, state, source, strategy, known, inspect=inspect, spill_dir=chosen.spill_dir)
    session.digest = chosen.digest
    session.open()
    session.take_over()
    state.open(session)
    return session


def _rollback(
    model: nn.Module, state: EngineState, update: ReloadSession | GatheredUpdate
) -> contextlib.AbstractContextManager[None]:
    """See ``rollback_on_failure``; a gathered update is a reload of its own, which sees to that."""
    if isinstance(update, GatheredUpdate):
        return contextlib.nullcontext()
    return rollback_on_failure(model, state, update)


@contextlib.contextmanager
def _aborted_on_failure(update: ReloadSession | GatheredUpdate) -> Iterator[None]:
    try:
        yield
    except BaseException:
        update.abort()
        raise


def _finish_update(state: EngineState, update: ReloadSession | GatheredUpdate) -> ReloadReport:
    """Commit an update; the caller closes it."""
    if isinstance(update, GatheredUpdate):
        update.report = update.intake.finish_whole()
        return update.report
    update.agree = state.vote
    report = update.finish()
    after_commit(state, None, update)
    return report
