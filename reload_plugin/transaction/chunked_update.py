"""Updates in several calls: vLLM's layerwise start and finish, and abort; in between the engine serves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..device.host_memory import settle_heap
from ..errors import SessionError
from ..interrupts import held, let_through
from ..report import ReloadReport
from .rollback import (
    abandon_open_session,
    after_commit,
    as_reload_errors,
    expected,
    learn_copy_plan,
    note_report,
    noting_failures,
    refuse_while_update_open,
    rollback_on_failure,
    session_for,
    with_all_ranks,
)
from .session import SERVES_OLD, ReloadSession, complete_record_of


@contextlib.contextmanager
def restore_for_reloading(model: nn.Module) -> Iterator[ReloadSession]:
    """Inside the block ``model.load_weights`` reloads: any number of calls, one commit at the end.

    The block works on the load format: parameters have the shapes and loaders of a freshly built
    model. Leaving it normally checks that everything came, processes and commits; leaving it by an
    exception puts the old weights back.

    Raises:
        SessionError: a weight update is open.
        WeightsError: at the end of the block, listing all that does not fit.

    """
    with noting_failures(model) as record:
        learn_copy_plan(model, record)
        session = session_for(model, record, "model.load_weights", "staged", expected(model, record))
        with rollback_on_failure(model, record, session), session:
            session.take_over()
            with session.loading(), let_through():
                yield session
            report = session.finish()
        after_commit(record, None, session)
        session.report = note_report(record, report)
        settle_heap()


@held()
def open_layerwise(model: nn.Module) -> None:
    """vLLM's ``initialize_layerwise_reload``: from now on ``model.load_weights`` stages a reload.

    Raises:
        SessionError: another update is open; it says whose.

    """
    record = complete_record_of(model)
    refuse_while_update_open(record)
    learn_copy_plan(model, record)
    session = session_for(model, record, "a weight update", "staged", expected(model, record))
    session.digest = "later"  # who finishes it does not give its report to anybody
    session.open()
    session.take_over()
    record.session = session


@held()
def finish_layerwise(model: nn.Module) -> ReloadReport:
    """vLLM's ``finalize_layerwise_reload``: check, process, commit.

    Raises:
        WeightsError: the update stays open: send what is missing and finish again, or abort it.

    """
    record = complete_record_of(model)
    try:
        with with_all_ranks(record):
            session: ReloadSession | None = record.session
            if session is None:
                raise SessionError(f"No weight update is open: none was started, or it failed. {SERVES_OLD}")
            session.agree = record.vote
            with as_reload_errors(record), rollback_on_failure(model, record, session):
                report = session.finish()
    except BaseException as error:
        record.last_error = f"{type(error).__name__}: {error}"
        raise
    record.session = None
    after_commit(record, None, session)
    report = note_report(record, report)
    settle_heap()
    return report


@held()
def abort_weight_update(model: nn.Module) -> bool:
    """End the open weight update; the engine serves what it served before. Says whether one was open."""
    record = complete_record_of(model)
    was_open = record.session is not None
    abandon_open_session(record)
    return was_open
