"""Where the weights of a live push go until it ends: into a reload session, or into a copy of them.

What a push will bring is known only when one like it came before. Then its weights go into a session, layer
by layer. Else they are gathered, in host memory or in a file, because what is done with them depends on
whether they turn out to be the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import nn

from ..checkpoint import HostCopy, SpillFile, TensorInfo
from ..errors import SERVES_OLD, weights_error
from ..load.stream import WeightStream
from ..load.tied_head import differing_from_served
from ..options import ReloadOptions, road_options
from ..plan.checkpoint_plan import Plan, PlanUnavailableError
from ..plan.mismatches import Mismatches
from ..plan.tracer import LoadTrace
from ..report import ReloadReport
from .collected import not_finite
from .engine_state import EngineState, opened_by
from .known import known_checkpoint, known_copy_plan, learn_copy_plan, plan_for, plan_listing, session_for
from .policies import policy_for_iterator, strategy_between_calls
from .reload import from_source, partially
from .rollback import after_commit, rollback_on_failure

Weights = Iterable[tuple[str, torch.Tensor]]

CHECKED_ALONE = 16
"""Weights of one push that the engine's own checkpoint does not have and that are tried on the model's loader
as they come, each by itself. The others are tried together at the end."""


class PushIntake(Protocol):
    """Takes the weights of one push."""

    opened_by: str
    in_order: bool
    """Whether a weight that comes again cannot be taken, because its layer may be processed already."""

    def load(self, weights: Weights) -> set[str] | None:
        """Take some of the weights; the caller may overwrite them afterwards.

        Returns:
            Names of the parameters that they go to, as far as they are known, else of the weights.

        Raises:
            ReloadError: some do not fit; the push has to be aborted.

        """

    def load_one(self, name: str, tensor: torch.Tensor) -> bool:
        """Take one weight in a shorter way, if there is one for it. If not, nothing has changed."""

    def finish(self, missing: list[str]) -> tuple[ReloadReport | None, bool]:
        """Commit. The report is None where the model uses none of the weights; the bool says whether they
        are the whole model.

        Args:
            missing: names that a larger push had and this one has not.

        Raises:
            ReloadError: nothing was committed; the push has to be aborted.

        """

    def abort(self) -> None:
        """Forget the weights."""


def open_intake(model: nn.Module, state: EngineState, source: str, known_whole: bool) -> PushIntake:
    """Where the weights of a push go.

    Args:
        model: that is served.
        state: of the model.
        source: what to call the weights.
        known_whole: whether the last push was the whole model, so that this one will be.

    Raises:
        ReloadError: the options in the environment are not valid.

    """
    chosen = road_options()
    policy = policy_for_iterator(model, state, chosen)
    if known_whole and policy.rollback != "spill" and chosen.keep_load_format is None:
        return StreamingIntake(model, state, source, chosen)
    return gathering_intake(model, state, source, chosen)


def gathering_intake(
    model: nn.Module, state: EngineState, source: str, chosen: ReloadOptions
) -> GatheringIntake:
    """A copy of the weights: in a file where memory is scarce or the caller wants one, else in memory."""
    in_file = (
        chosen.keep_load_format == "spill" or policy_for_iterator(model, state, chosen).rollback == "spill"
    )
    kept = SpillFile(chosen.spill_dir, source) if in_file else HostCopy(source)
    return GatheringIntake(model, state, kept, chosen)


def inspect_finite(_: str, tensor: torch.Tensor) -> str | None:
    """For a session: why a weight is refused where only finite values are wanted."""
    return not_finite(tensor)


class StreamingIntake:
    """Into a session: every layer is processed when it is complete, and all are committed at the end."""

    in_order = True

    def __init__(self, model: nn.Module, state: EngineState, source: str, chosen: ReloadOptions) -> None:
        self.opened_by = opened_by()
        self._model, self._state = model, state
        learn_copy_plan(model, state)
        # An engine that serves nothing has nothing to keep until the commit.
        policy = policy_for_iterator(model, state, chosen)
        strategy = strategy_between_calls(state, policy) if state.broken is None else "streaming"
        inspect = inspect_finite if chosen.check_finite else None
        known = known_checkpoint(model, state)
        self._session = session_for(
            model, state, source, strategy, known, inspect=inspect, spill_dir=chosen.spill_dir
        )
        self._session.digest = "later"
        self._session.open()

    def load(self, weights: Weights) -> set[str] | None:
        loaded = self._session.load(weights)
        if self._session.mismatches:
            raise weights_error(self._session.source, SERVES_OLD, **vars(self._session.mismatches))
        return loaded

    def load_one(self, name: str, tensor: torch.Tensor) -> bool:
        return self._session.load_one(name, tensor)

    def finish(self, missing: list[str]) -> tuple[ReloadReport | None, bool]:
        del missing  # the session names the slots
        session, state = self._session, self._state
        session.agree = state.vote
        with rollback_on_failure(self._model, state, session):
            report = session.finish()
        after_commit(state, None, session)
        state.outcome.kept = report.kept
        return report, True

    def abort(self) -> None:
        self._session.abort()


class GatheringIntake:
    """Into a copy, which is reloaded like a folder when the push ends."""

    in_order = False

    def __init__(
        self, model: nn.Module, state: EngineState, kept: HostCopy | SpillFile, chosen: ReloadOptions
    ) -> None:
        self.opened_by = opened_by()
        self._model, self._state, self._kept, self._chosen = model, state, kept, chosen
        self._shapes = state.start.shapes(model, state.record)
        self._tried = 0
        """Weights that were tried alone."""

    def load(self, weights: Weights) -> set[str] | None:
        mismatches = Mismatches()
        names = []
        for name, tensor in _checked(weights, mismatches):
            self._check(name, tensor, mismatches)
            if mismatches:
                break
            self._kept.add(name, tensor)
            names.append(name)
        if mismatches:
            raise weights_error(self._kept.description, SERVES_OLD, **vars(mismatches))
        return self._parameters_of(names)

    def load_one(self, name: str, tensor: torch.Tensor) -> bool:
        if tensor.is_meta or self._chosen.check_finite or self._shapes.get(name) != tuple(tensor.shape):
            return False
        self._kept.add(name, tensor)
        return True

    def _check(self, name: str, tensor: torch.Tensor, mismatches: Mismatches) -> None:
        if self._chosen.check_finite and (reason := not_finite(tensor)) is not None:
            mismatches.nonfinite[name] = reason
        shape = tuple(tensor.shape)
        expected = self._shapes.get(name)
        if expected == shape or (expected is None and self._tried >= CHECKED_ALONE):
            return
        self._tried += expected is None
        info = TensorInfo(name, shape, tensor.dtype)
        with contextlib.suppress(PlanUnavailableError):
            start = self._state.start.known(self._model, self._state.record)
            found = plan_listing(self._model, self._state, [info], self._kept.description, start).mismatches
            for kind in ("unexpected", "misshapen"):
                getattr(mismatches, kind).update(getattr(found, kind))

    def _parameters_of(self, names: list[str]) -> set[str]:
        copy_plan = known_copy_plan(self._state)
        if copy_plan is None:
            return set(names)
        plans = [copy_plan.of.get(name) for name in names]
        return {copy.parameter for plan in plans if plan is not None for copy in plan.copies or ()}

    def finish(self, missing: list[str]) -> tuple[ReloadReport | None, bool]:
        if missing:
            reasons = dict.fromkeys(missing, "was in an earlier push of these weights")
            raise weights_error(self._kept.description, SERVES_OLD, missing=reasons)
        model, state, kept = self._model, self._state, self._kept
        plan = plan_for(model, state, kept)
        if plan is not None and _uses_nothing(plan):
            if other := differing_from_served(state.record, kept.read()):
                raise weights_error(kept.description, SERVES_OLD, unexpected=other)
            kept.close()
            return None, False
        if plan is not None and plan.mismatches.missing:
            asked = self._chosen.model_copy(update={"partial": True, "policy": "auto"})
            return partially(model, state, kept, asked), False
        return self.finish_whole(), True

    def finish_whole(self) -> ReloadReport:
        """Commit weights that have to be the whole model.

        Raises:
            ReloadError: they are not, or anything else; nothing was committed.

        """
        asked = self._chosen.model_copy(update={"keep_load_format": None, "policy": self._policy()})
        report = from_source(self._model, self._state, self._kept, asked)
        if isinstance(self._kept, HostCopy) and self._chosen.keep_load_format is None:
            # A copy of the model in host memory is not kept unasked.
            self._state.replace_rollback_source(None)
        return report

    def _policy(self) -> str:
        """The caller's policy, for weights that can be read again by now."""
        return "auto" if self._chosen.policy == "spill" else self._chosen.policy

    def abort(self) -> None:
        if self._state.rollback_source is not self._kept:
            self._kept.close()


def _uses_nothing(plan: Plan) -> bool:
    return not plan.mismatches.unexpected and all(written == "none" for written in plan.coverage.values())


def _checked(weights: Weights, mismatches: Mismatches) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights one by one, as long as they are tensors with values and none comes twice in this call."""
    trace = LoadTrace(mismatches)
    stream = WeightStream(weights, trace, lambda: None)
    with contextlib.suppress(StopIteration):
        while not mismatches:
            name, tensor = stream.fetch()
            if tensor is not None:
                trace.note_arrival(name, tensor)
                yield name, tensor
