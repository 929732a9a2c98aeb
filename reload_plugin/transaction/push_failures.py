"""Pushes that failed: what is told of them, to whom, and what follows of them is refused.

A framework may swallow the error of one call and go on with the next weights. Those alone would make a
mixture. And a push that failed on one rank may be complete on another, which must not commit it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from ..errors import SERVES_OLD, ReloadError, WeightsError
from ..ranks.votes import counts_calls
from .engine_state import EngineState
from .named_weights import NamedWeights
from .push import FailedPush
from .reload_call import with_all_ranks


class PushFailures:
    """What failed in the pushes into one model."""

    def __init__(self) -> None:
        self.pending: FailedPush | None = None
        """The push that failed last, until one begins anew."""
        self._unheard: BaseException | None = None
        """What failed without anybody having been told; raised at the next forward pass."""
        self._version = 0
        """The generation that was served when a push failed last."""

    def note(self, state: EngineState, names: AbstractSet[str], error: BaseException) -> None:
        """A push failed.

        Args:
            state: of the model.
            names: of its weights so far.
            error: why.

        """
        state.outcome.failed(error)
        self._version = state.generation.version
        unused = error.unexpected.keys() if isinstance(error, WeightsError) else ()
        lost = set(names).difference(unused)
        self.pending = FailedPush(lost, error) if lost else None
        self.note_unheard(error, direct=False)

    def forget_if_outdated(self, state: EngineState) -> None:
        """New weights are served since a push failed, by whatever road: its failure is of no interest."""
        if state.generation.version != self._version:
            self.pending, self._unheard, self._version = None, None, state.generation.version

    def all_is_well(self) -> None:
        """A push was committed."""
        self._unheard = None

    # -- what follows of a failed push -------------------------------------------------------------

    def admit(
        self, state: EngineState, named: NamedWeights, expected: Callable[[], AbstractSet[str]]
    ) -> None:
        """Lets a call pass that begins a push anew.

        Args:
            state: of the model.
            named: the weights of the call; all are taken and dropped if it is refused.
            expected: gives the names that end a push when all have come.

        Raises:
            SessionError: the call goes on with the push that failed.

        """
        if self.pending is None:
            return
        if named.first in self.pending.names:
            self.pending = None
            return
        for _ in named:
            pass
        self.pending.names.update(named.names)
        awaited = expected()
        # A rank that failed did not see all names of its call, so it cannot tell when the others are done.
        # Within calls of an executor a vote that nobody waits for does no harm.
        self._refuse(state, over=counts_calls() or (bool(awaited) and awaited <= self.pending.names))

    def refuse_end(self, state: EngineState) -> None:
        """The caller ends a push.

        Raises:
            SessionError: it is the one that failed.

        """
        if self.pending is not None:
            self._refuse(state, over=True)

    def _refuse(self, state: EngineState, over: bool) -> None:
        """Raises for what comes of a push that failed. ``over``: other ranks commit it now, unless told."""
        assert self.pending is not None
        self._unheard = self.pending.error  # who goes on was not told, or did not listen
        error = self.pending.refusal()
        if over:
            with with_all_ranks(state):
                raise error from self.pending.error
        raise error from self.pending.error

    # -- other ranks -------------------------------------------------------------------------------

    def tell_other_ranks(self, state: EngineState) -> None:
        """Vote against the push that failed here and may be ready to be committed elsewhere."""
        if self.pending is None:
            return
        with contextlib.suppress(type(self.pending.error)), with_all_ranks(state):
            raise self.pending.error

    def other_ranks_know(self) -> None:
        """They dropped the push that failed here."""
        if self.pending is not None:
            self.pending.told_before_forward_pass = True

    def tell_before_forward_pass(self, state: EngineState, waits: Callable[[AbstractSet[str]], bool]) -> None:
        """Other ranks may commit now what failed here.

        Args:
            state: of the model.
            waits: whether a push of these names waits for more, and is not committed.

        """
        failed = self.pending
        if failed is None or (failed.told_before_forward_pass and not counts_calls()):
            return
        failed.told_before_forward_pass = True
        if counts_calls() or not waits(failed.names):
            self.tell_other_ranks(state)

    # -- errors that nobody heard of ---------------------------------------------------------------

    def note_unheard(self, error: BaseException, direct: bool) -> None:
        """Remember an error that the caller may swallow.

        Inside an RPC the worker tells whether it was. Outside of one nobody does: errors of ``load_weights``
        reach whoever pushes, those of processing (``direct``) are known to be swallowed.
        """
        call = current_call.get()
        if call is not None:
            call.append((self, error))
        elif direct:
            self._unheard = error

    def note_swallowed(self, error: BaseException) -> None:
        """The call in which a push failed with ``error`` returned as if it had not."""
        self._unheard = error

    def raise_unheard(self, state: EngineState) -> None:
        """Raise what nobody heard of; on every rank, because one that goes on alone waits for the others.

        Raises:
            ReloadError: that is the case; the old weights are served.

        """
        error, self._unheard = self._unheard, None
        with with_all_ranks(state):
            if error is not None:
                raise ReloadError(
                    "The last push of weights failed, and its caller did not say so: "
                    f"{type(error).__name__}: {error}\n{SERVES_OLD}"
                ) from error
            if state.vote is not None:
                state.vote(None)


current_call: contextvars.ContextVar[list[tuple[PushFailures, BaseException]] | None] = (
    contextvars.ContextVar("current_call", default=None)
)
"""Inside a call of the executor to its worker: pushes that failed in it, with their errors."""
