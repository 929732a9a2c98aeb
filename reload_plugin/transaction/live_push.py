"""Live pushes: a script that calls ``model.load_weights`` on the served model, outside of any reload.

Most RL frameworks push this way, in one call or in one call a tensor, and few of them say when a push is
over. So the calls are gathered into one update, and the served weights stay whole until it ends:

1. when every name of the last push has come (at first: of the engine's own checkpoint), inside that call;
2. when ``process_weights_after_loading`` is called on the whole model;
3. at the next forward pass, for a set of names that is not a part of a larger known push. It is committed as
   a whole reload if it is the whole model, else as a partial update, and the set is remembered. A part of a
   larger push waits for the rest, and the old weights answer;
4. when a call raises, the engine is put to sleep, or another reload begins: it is dropped.
"""

from __future__ import annotations

import enum
import logging
import weakref
from typing import Any

import torch
from torch import nn

from ..errors import SERVES_OLD, RanksDisagreeError, ReloadError
from ..interrupts import held
from ..ranks.votes import counts_calls
from ..report import ReloadReport
from .chunked_update import GatheredUpdate
from .engine_state import EngineState, state_of
from .misplaced_weights import refuse_misplaced_weights
from .named_weights import NamedWeights, Weights, name_of
from .push import SOURCE, LivePush
from .push_failures import PushFailures
from .push_intake import open_intake
from .push_kinds import PushKind, PushKinds
from .reload_call import as_reload_errors, with_all_ranks

logger = logging.getLogger("vllm.reload_plugin")


class Latest(enum.Enum):
    """What came last; the same on every rank."""

    FORWARD_PASS = enum.auto()
    """Nothing was pushed since."""
    PUSH = enum.auto()
    """Something was pushed, and nothing was committed since the last forward pass."""
    COMMIT = enum.auto()
    """A push was committed since the last forward pass. What is pushed now belongs to it."""


class LoadWeights:
    """``model.load_weights`` of a served model, as an attribute of the instance.

    Args:
        model: recorded, its start over. Kept weakly: it holds this object.

    """

    def __init__(self, model: nn.Module) -> None:
        self._model: weakref.ref[nn.Module] = weakref.ref(model)
        self.kinds = PushKinds()
        self.failures = PushFailures()
        self._fast: LivePush | None = None
        """The push that was opened last; under way only while the state says so."""
        self._latest = Latest.FORWARD_PASS

    def __call__(self, weights: Weights, *args: Any, **kwargs: Any) -> set[str] | None:
        """Load weights into the push that is under way, or begin one.

        Args:
            weights: (checkpoint name, tensor) pairs. The caller may overwrite a tensor when the next one is
                asked for, or when the call returns.
            *args: further arguments of the model's own ``load_weights`` are refused.
            **kwargs: likewise.

        Returns:
            Names of the parameters that the weights go to.

        Raises:
            ReloadError: the push was dropped and the old weights are served; or, where the call brought the
                last weight, the commit failed.

        """
        model = self._require_model()
        if args or kwargs:
            raise ReloadError(
                "model.load_weights of a served model takes the weights and nothing else: further arguments "
                f"are those of {type(model).__name__}'s own loader, which cannot load into it. {SERVES_OLD}"
            )
        state = state_of(model)
        self._note_push()
        self.failures.forget_if_outdated(state)
        with held(), state.in_a_call():
            if isinstance(state.update, GatheredUpdate):
                return state.update.load(NamedWeights(weights))
            return self._take(model, state, weights)

    def load_one(self, weights: object) -> set[str] | None:
        """Load a weight that comes alone, in a push that is under way. This is what a push of many thousand
        calls consists of.

        Returns:
            Its name; None where the call is any other, and then nothing has changed.

        """
        if type(weights) is not list or len(weights) != 1 or self._fast is None:
            return None
        push, item = self._fast, weights[0]
        name = name_of(item)
        if name is None or len(item) != 2 or not isinstance(item[1], torch.Tensor) or ".base_layer." in name:
            return None
        model = self._require_model()
        state = state_of(model)
        if state.update is not push or state.asleep or not push.takes_alone(name):
            return None
        try:
            with as_reload_errors(state):
                taken = push.intake.load_one(name, item[1].detach())
        except BaseException as error:
            push.note([name])
            self._drop(state, push, error)
            raise
        if not taken:
            return None
        self._note_push()
        push.note([name])
        return {name}

    def pass_through(self, weights: Weights, writer: str, args: Any = (), kwargs: Any = None) -> Any:
        """The model's own ``load_weights``, into the weights that are served, for somebody who knows how.

        Args:
            weights: for it.
            writer: who that is, for ``status``.
            args: further arguments of it.
            kwargs: likewise.

        """
        model = self._require_model()
        load_weights: Any = type(model).load_weights  # type: ignore[attr-defined]
        try:
            return load_weights(model, weights, *args, **(kwargs or {}))
        finally:
            self.note_written(writer)

    def note_written(self, writer: str, whole: bool = False) -> None:
        """Somebody else wrote to the served weights; ``whole``: to all of them."""
        state = state_of(self._require_model())
        if isinstance(state.update, LivePush):
            state.abandon_update()
        state.mark_unknown(writer, heals=whole)

    # -- ends --------------------------------------------------------------------------------------

    def finish(self) -> ReloadReport | None:
        """Whole-model ``process_weights_after_loading``: finishes the push that is under way.

        Without one there is nothing to do: frameworks call it twice, and vLLM's own run twice on processed
        weights would spoil them.

        Raises:
            MissingWeightsError: the push is a part of a larger one that was pushed before.
            ReloadError: see there. In all cases the old weights are served.

        """
        model = self._require_model()
        state = state_of(model)
        self._note_push()
        self.failures.forget_if_outdated(state)
        with held(), state.in_a_call():
            push = state.update
            try:
                self.failures.refuse_end(state)
                if not isinstance(push, LivePush):
                    logger.debug("process_weights_after_loading: nothing was pushed, so nothing changes.")
                    return None
                return self._commit(state, push)
            except BaseException as error:
                self.failures.note_unheard(error, direct=True)
                raise

    def before_forward_pass(self) -> None:
        """Ends the push that is under way, unless more of it has to come.

        Raises:
            ReloadError: the push cannot be committed; or an earlier one failed and its caller did not say so.
                The next forward pass answers with the old weights.

        """
        model = self._model()
        if model is None or self._latest is Latest.FORWARD_PASS:
            return
        state = state_of(model)
        if state.asleep:
            return
        try:
            self._end_before_forward_pass(state)
        finally:
            self._latest = Latest.FORWARD_PASS

    def _end_before_forward_pass(self, state: EngineState) -> None:
        self.failures.forget_if_outdated(state)
        self.failures.raise_unheard(state)
        push = state.update
        if not isinstance(push, LivePush):
            self.failures.tell_before_forward_pass(state, self.kinds.is_half)
            return
        with held(), state.in_a_call():
            if self.kinds.is_half(push.names):
                logger.debug("%s: part of a push; the old weights answer.", push.describe())
            else:
                self._commit_or_drop(state, push)

    # -- inside ------------------------------------------------------------------------------------

    def _require_model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "whoever calls its method has the model"
        return model

    def _take(self, model: nn.Module, state: EngineState, weights: Weights) -> set[str] | None:
        state.refuse_while_asleep("push")
        named = NamedWeights(weights)
        self.failures.admit(state, named, lambda: self._expected(model, state))
        push = self._push_for(model, state, named)
        try:
            with as_reload_errors(state):
                loaded = push.intake.load(named)
        except BaseException as error:
            push.note(named.names)
            self._drop(state, push, error)
            raise
        push.note(named.names)
        if push.is_over:
            self._commit(state, push)
        return loaded

    def _push_for(self, model: nn.Module, state: EngineState, named: NamedWeights) -> LivePush:
        """The open push, or a new one."""
        push = state.update
        if isinstance(push, LivePush):
            if named.first is None or named.first not in push.names or not push.intake.in_order:
                return push
            logger.info("%s begins again, and what came of it before is dropped.", push.describe())
        refuse_misplaced_weights(state)
        state.refuse_while_update_open()
        known_whole = self._will_be_whole(named) and not isinstance(push, LivePush)
        opened = LivePush(open_intake(model, state, SOURCE, known_whole), self._expected(model, state))
        state.open(opened)
        self._fast = opened
        return opened

    def _will_be_whole(self, named: NamedWeights) -> bool:
        """Whether a push that begins now will be like the last one, and that was the whole model."""
        last = self.kinds.last
        if last is None or not last.whole or last.repeats:
            return False
        # What comes right after a push, and was not in it, belongs to it: a head that is tied, say.
        return self._latest is not Latest.COMMIT or named.first in last.names

    def _expected(self, model: nn.Module, state: EngineState) -> frozenset[str]:
        return self.kinds.expected(lambda: state.start.shapes(model, state.record))

    def _note_push(self) -> None:
        if self._latest is Latest.FORWARD_PASS:
            self._latest = Latest.PUSH

    def _commit(self, state: EngineState, push: LivePush) -> ReloadReport | None:
        """Finish a push on all ranks or on none; it is over either way."""
        state.close(push)
        self._fast = None
        try:
            with with_all_ranks(state), as_reload_errors(state):
                report, whole = push.intake.finish(self.kinds.missing(push.names))
        except BaseException as error:
            push.abort()
            self.failures.note(state, push.names, error)
            raise
        if self._latest is Latest.COMMIT and self.kinds.last:
            self.kinds.extend_last(push.names)
        else:
            self.kinds.learn(PushKind(frozenset(push.names), whole, push.repeats))
        self._latest = Latest.COMMIT
        self.failures.all_is_well()
        if report is not None:
            state.outcome.succeeded(report)
        return report

    def _commit_or_drop(self, state: EngineState, push: LivePush) -> None:
        """At a forward pass. A rank that failed has told its own caller; the others drop the push."""
        try:
            self._commit(state, push)
        except RanksDisagreeError as error:
            self.failures.other_ranks_know()
            logger.warning("%s was dropped: %s", push.describe(), error)

    def _drop(self, state: EngineState, push: LivePush, error: BaseException) -> None:
        """A call raised."""
        state.close(push)
        push.abort()
        self.failures.note(state, push.names, error)
        if push.is_over or counts_calls():
            self.failures.tell_other_ranks(state)


def live_push_of(model: nn.Module) -> LoadWeights | None:
    """What stands in for ``load_weights`` of a served model, if anything does."""
    found = model.__dict__.get(GUARD_ATTRIBUTE)
    return found if isinstance(found, LoadWeights) else None


GUARD_ATTRIBUTE = "_reload_plugin_live"
