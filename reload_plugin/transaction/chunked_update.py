"""Updates in several calls: a block, vLLM's layerwise start and finish, and abort; in between the engine
serves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from ..device.host_memory import settle_heap
from ..errors import SERVES_OLD, SessionError
from ..interrupts import held, let_through
from ..report import ReloadReport
from .engine_state import EngineState, state_of
from .known import known_checkpoint, learn_copy_plan, session_for
from .reload_call import as_reload_errors, reload_call, with_all_ranks
from .rollback import after_commit, rollback_on_failure
from .session import ReloadSession


@contextlib.contextmanager
def restore_for_reloading(model: nn.Module) -> Iterator[ReloadSession]:
    """Inside the block ``model.load_weights`` reloads: any number of calls, one commit at the end.

    Between two calls the model shows and serves the old weights, so that it may generate inside the block.
    Loaders of its parameters (``parameter.weight_loader``) load into the reload too. Leaving the block
    normally checks that everything came, processes and commits; leaving it by an exception drops what was
    loaded.

    Raises:
        SessionError: a weight update is open, another block among them.
        WeightsError: at the end of the block, listing all that does not fit.

    """
    with reload_call(model, spans_calls=True) as state:
        session = _session(model, state, "model.load_weights")
        with rollback_on_failure(model, state, session), session:
            session.take_over()
            state.open(session)
            try:
                with let_through():
                    yield session
            finally:
                state.close(session)
            session.agree = state.vote
            report = session.finish()
        after_commit(state, None, session)
        state.outcome.succeeded(report)
        settle_heap()


@held()
def open_layerwise(model: nn.Module) -> None:
    """vLLM's ``initialize_layerwise_reload``: from now on ``model.load_weights`` loads into an update.

    Raises:
        SessionError: another update is open; it says whose.

    """
    state = state_of(model)
    with state.in_a_call():
        state.refuse_while_update_open()
        session = _session(model, state, "a weight update")
        session.digest = "later"  # nobody is given the report of an update that is finished this way
        session.open()
        session.take_over()
        state.open(session)


@held()
def finish_layerwise(model: nn.Module) -> ReloadReport:
    """vLLM's ``finalize_layerwise_reload``: check, process, commit.

    Raises:
        SessionError: no update is open.
        WeightsError: the update stays open: send what is missing and finish again, or abort it.

    """
    state = state_of(model)
    with state.in_a_call():
        try:
            with with_all_ranks(state):
                session = state.update
                if not isinstance(session, ReloadSession):
                    raise SessionError(
                        f"No weight update is open: none was started, or it failed. {SERVES_OLD}"
                    )
                session.agree = state.vote
                with as_reload_errors(state), rollback_on_failure(model, state, session):
                    report = session.finish()
        except BaseException as error:
            state.outcome.failed(error)
            raise
        state.close(session)
        after_commit(state, None, session)
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


def _session(model: nn.Module, state: EngineState, source: str) -> ReloadSession:
    """A session for weights that nobody lists beforehand."""
    learn_copy_plan(model, state)
    return session_for(model, state, source, "staged", known_checkpoint(model, state))
