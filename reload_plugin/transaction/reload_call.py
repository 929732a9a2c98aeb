"""Around every reload: one at a time, on all ranks or on none, and errors that say what is served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..device.ops import ops_for
from ..errors import SERVES_OLD, ReloadError
from ..interrupts import held
from ..options import Together
from ..ranks.joint import joint_vote, together_in
from ..ranks.votes import vote_for
from .engine_state import EngineState, state_of
from .misplaced_weights import refuse_misplaced_weights


@contextlib.contextmanager
def reload_call(model: nn.Module, spans_calls: bool = False, together: Any = None) -> Iterator[EngineState]:
    """Around one reload, from its beginning to its commit. What it fails with is kept for ``status``.

    Args:
        model: that is reloaded.
        spans_calls: the caller's own code runs in between and may serve; the model is taken only for a call
            of the session each.
        together: the option of that name, not yet checked.

    Raises:
        UnsupportedError: see ``refuse_misplaced_weights``.
        SessionError: the engine sleeps; a weight update is open and well, or another thread is in a call, it
            says whose.

    """
    state = state_of(model)
    with held(), state.in_a_call() if not spans_calls else contextlib.nullcontext():
        try:
            with with_all_ranks(state, together_in(together)):
                refuse_misplaced_weights(state)
                state.refuse_while_asleep("reload")
                state.refuse_while_update_open()
                with _reserved_given_back(state):
                    yield state
        except BaseException as error:
            state.outcome.failed(error)
            raise


@contextlib.contextmanager
def _reserved_given_back(state: EngineState) -> Iterator[None]:
    """Afterwards torch holds no more of the device than before: what is served beside it allocates too."""
    ops = ops_for(state.record.target_device)
    reserved = ops.reserved_bytes()
    try:
        yield
    finally:
        ops.give_back(reserved)


@contextlib.contextmanager
def as_reload_errors(state: EngineState) -> Iterator[None]:
    """Whatever goes wrong in code of ours or of vLLM's says what is served now."""
    before = state.generation
    try:
        yield
    except ReloadError:
        raise
    except Exception as error:
        now = SERVES_OLD if state.generation is before else "The new weights are served."
        raise ReloadError(f"The reload failed with {type(error).__name__}: {error}. {now}") from error


@contextlib.contextmanager
def with_all_ranks(state: EngineState, engines: Together | None = None) -> Iterator[None]:
    """One reload on every rank of the model, and of the engines that reload together with it: what fails here
    before the commit fails everywhere.

    A commit itself cannot be taken back elsewhere: a rank on which it fails refuses to serve.

    Raises:
        RanksDisagreeError: another rank failed, or did not get ready in time.
        EngineBrokenError: the other ranks have committed and this one could not; or it does not know whether
            they have.

    """
    if state.vote is not None:
        state.refuse_while_update_open()
    vote = state.vote = vote_for(state.record) if engines is None else joint_vote(state.record, engines)
    before = state.generation
    try:
        yield
    except BaseException as error:
        if vote is not None and vote.committed and state.generation is before:
            reason = f"the other ranks committed a reload that failed here: {error}"
            raise state.break_(reason) from error
        if vote is not None and vote.in_doubt:
            raise state.break_(
                f"this rank was ready to commit and does not know if others did: {error}"
            ) from error
        if vote is not None:
            vote(error)
        raise
    finally:
        state.vote = None
    if vote is not None and vote.postponed is not None:
        raise vote.postponed
