"""Where the old weights can be read again, and bringing them back when a reload failed half way."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

from torch import nn

from .. import vllm_api
from ..checkpoint import DummyWeights, Rereadable, Source, TensorInfo, held_open
from ..errors import SERVES_OLD, SourceError
from ..interrupts import call_held
from ..plan.checkpoint_plan import Plan
from ..record.late_bound import make_anew
from .copied_heads import refresh_copied_heads
from .engine_state import EngineState
from .known import known_checkpoint, session_for
from .session import ReloadSession
from .session_state import SessionState

logger = logging.getLogger("vllm.reload_plugin")


def has_rollback_source(model: nn.Module, state: EngineState) -> bool:
    """Whether the served weights could be loaded again, should a reload fail half way."""
    if state.generation.version == 0 and state.rollback_source is None:
        state.replace_rollback_source(_start_generation(model, state))
    good = state.rollback_source
    return good is not None and bool(good.unchanged())


def _start_generation(model: nn.Module, state: EngineState) -> Rereadable | None:
    """What a cold start loaded, if it can be loaded again."""
    if vllm_api.starts_from_dummy(state.record.vllm_config):
        return DummyWeights()
    if state.start.stamps is None:  # then looking is in vain, and may ask a hub
        return None
    source = state.start.source(model, state.record)
    return source if getattr(source, "stamps", None) == state.start.stamps else None


@contextlib.contextmanager
def rollback_on_failure(
    model: nn.Module, state: EngineState, session: ReloadSession, undo: bool = True
) -> Iterator[None]:
    """Around the loading and the commit of a session: a failure after some groups were committed reads the
    old weights again.

    Raises:
        EngineBrokenError: they cannot be read again.

    """
    before = state.generation
    with contextlib.ExitStack() as stack:
        if undo:
            strategy = session.parts.strategy
            needed = strategy.commits_each_group and not strategy.has_undo_log
            _hold_rollback_source(model, state, needed, stack)
        try:
            yield
        except BaseException as error:
            if session.state is SessionState.COMMITTED:  # Ctrl-C, just after: the new weights stay
                session.abort()
                state.close(session)
                after_commit(state, None, session)
            elif session.touched_groups:
                if state.vote is not None and state.vote.committed:
                    raise  # the other ranks have the new weights: see with_all_ranks
                if not undo:
                    raise state.break_(f"a streaming reload failed half way: {error}") from error
                if not _undo(session, state):
                    _roll_back(model, state)
                state.rolled_back_to(before)
            raise


def _undo(session: ReloadSession, state: EngineState) -> bool:
    """Bring the old weights back from the session's undo log. Returns whether it has one.

    Raises:
        EngineBrokenError: the device failed.

    """
    log = session.parts.log
    if log.undo is None:
        return False
    session.abort()
    try:
        log.before_write()
        log.undo.roll_back()
        make_anew(state.record.late_bound)
        log.after_writes()
    except BaseException as error:
        reason = f"a reload failed half way and the weights served before could not be put back: {error}"
        raise state.break_(reason) from error
    logger.warning("A reload failed after some layers were committed; their old values were put back.")
    return True


def _hold_rollback_source(
    model: nn.Module, state: EngineState, needed: bool, stack: contextlib.ExitStack
) -> None:
    """Keep the files of the served weights open: a trainer may delete them just when the next ones come."""
    has_rollback_source(model, state)  # for what the engine started from
    try:
        stack.enter_context(held_open(state.rollback_source))
    except (OSError, SourceError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if needed and not full:
            raise SourceError(
                f"The weights that are served cannot be read again ({error}), as a failure would ask for. "
                f"{SERVES_OLD} Reload once more: without a rollback source in files a copy is kept until the "
                "commit."
            ) from error


def _roll_back(model: nn.Module, state: EngineState) -> None:
    """Some groups were committed and then the reload failed: load the old weights from their source."""
    good = state.rollback_source
    try:
        if good is None or not good.unchanged():
            raise SourceError("the weights served before are gone")
        with session_for(
            model, state, good.description, "streaming", known_checkpoint(model, state)
        ) as session:
            session.digest = "later"
            if isinstance(good, DummyWeights):
                with session.loading():
                    vllm_api.load_dummy(state.record.vllm_config, state.record.model_config, model)
                session.finish(check=False)
            else:
                session.load(good.read(), call_held)
                session.finish()
    except BaseException as error:
        reason = f"a reload failed half way and the weights served before could not be read: {error}"
        raise state.break_(reason) from error
    logger.warning("A reload failed after some layers were committed; the old weights were read again.")


def after_commit(
    state: EngineState, source: Source | None, session: ReloadSession, plan: Plan | None = None
) -> None:
    """What a good reload leaves behind for the next one. ``source`` gives its weights again, if any does."""
    state.replace_rollback_source(source)
    completeness = session.parts.completeness
    if plan is not None:
        state.plans.learn(plan)
    elif completeness.has_unplanned_weights:
        arrived = [TensorInfo(name, one.shape, one.dtype) for name, one in completeness.arrived.items()]
        state.plans.learn_by_loader(completeness.names_of_group(state.record), arrived)
    state.outcome.error = None
    refresh_copied_heads(state)
