"""What is known of the next weights before they come: from a plan of theirs, the last reload, or the
start.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checkpoint import Source, TensorInfo
from ..commit.strategies import StrategyName as Policy
from ..device.ops import ops_for
from ..errors import ReloadError
from ..load.overflow import Overflow
from ..plan.checkpoint_plan import Plan, PlanUnavailableError, make_plan
from ..plan.copy_plan import CopyPlan
from ..plan.known_checkpoint import KnownCheckpoint
from ..record.placement import placement
from .engine_state import EngineState
from .session import ReloadSession

logger = logging.getLogger("vllm.reload_plugin")


def known_checkpoint(
    model: nn.Module, state: EngineState, plan: Plan | None = None, whole_model: bool = False
) -> KnownCheckpoint:
    """What is known of the weights of the next reload: from a plan of theirs, or from the last reload."""
    names = state.plans.names_of_group if plan is None else plan.names_of_group
    copy_plan = known_copy_plan(state, whole_model) if plan is None else plan.copy_plan
    start = state.start.known(model, state.record)
    return KnownCheckpoint(names, plan is not None, copy_plan, start.was_written, start.start_shapes)


def session_for(
    model: nn.Module,
    state: EngineState,
    description: str,
    policy: Policy,
    known: KnownCheckpoint,
    **chosen: Any,
) -> ReloadSession:
    """A session over a model that puts weights aside when they come in too wild an order: on disk, or in host
    memory where a device serves.
    """
    folder = chosen.pop("spill_dir", None)
    if state.parked is not None and _tail_reads_others(model, state):
        policy = "staged"  # what is committed is on the host, where MLA's attention cannot read it

    def order(infos: Any) -> Any:
        return _order(model, state, infos)

    in_order = chosen.pop("in_order", True) and policy in ("streaming", "undo") and known.planned
    overflow = (
        None
        if in_order
        else Overflow(folder, order, in_memory=not ops_for(state.record.target_device).on_host)
    )
    return ReloadSession(
        model,
        source=description,
        policy=policy,
        expected=known,
        overflow=overflow,
        agree=state.vote,
        **chosen,
    )


def _tail_reads_others(model: nn.Module, state: EngineState) -> bool:
    """Whether what is processed last may read weights of other layers: a hook of the model, or attention that
    holds a projection.
    """
    if hasattr(model, "process_weights_after_loading"):
        return True
    last = (layer.ref() for layer in state.record.layers if layer.deferred)
    return any(
        True
        for attention in last
        if attention is not None
        for part in attention.children()
        for _ in part.parameters()
    )


def _order(model: nn.Module, state: EngineState, infos: list[TensorInfo]) -> list[str]:
    """Names group by group: by the copy plan where it has them, else by what the loader does on meta
    tensors.
    """
    names = [info.name for info in infos]
    copy_plan = state.plans.copy_plan
    copies = copy_plan.of if copy_plan is not None else {}
    if not all(name in copies for name in names):
        with contextlib.suppress(PlanUnavailableError, ReloadError):
            return list(plan_listing(model, state, infos, "the weights put aside", None).order)
        return names

    def first_group(name: str) -> list[int]:
        return [state.record.group_of[copy.parameter] for copy in copies[name].copies or ()][:1]

    return sorted(names, key=first_group)


def learn_copy_plan(model: nn.Module, state: EngineState) -> None:
    """Before weights that nobody lists: make a copy plan for the last ones, or for the engine's own
    checkpoint.

    Costs one pass of the model's loader over meta tensors, once for each placement.
    """
    here, plans = placement(state.record), state.plans
    if plans.copy_plan_on(here) is not None:
        return
    infos = plans.last_listing()
    if infos is None and plans.was_tried_on(here):
        return
    if infos is None and (source := state.start.source(model, state.record)) is not None:
        infos = source.infos()
    if not infos or not plans.begin_try(here, infos):
        return
    with contextlib.suppress(PlanUnavailableError, ReloadError):
        start = state.start.known(model, state.record)
        plan = plan_listing(model, state, infos, "the last weights", start)
        if not plan.mismatches:
            plans.learn(plan)


def plan_for(model: nn.Module, state: EngineState, source: Source) -> Plan | None:
    """The plan of a source that can be listed; None when the model's loader cannot be planned."""
    infos = source.infos()
    if infos is None:
        return None
    if (kept := state.plans.plan_of(infos, placement(state.record))) is not None:
        return kept
    try:
        start = state.start.known(model, state.record)
        made = plan_listing(model, state, infos, source.description, start)
    except PlanUnavailableError as reason:
        logger.info("No plan for %s: %s", source.description, reason)
        return None
    state.plans.keep(made)
    return made


def plan_listing(
    model: nn.Module,
    state: EngineState,
    infos: Sequence[TensorInfo],
    source: str,
    known: KnownCheckpoint | None,
) -> Plan:
    """Make a plan, and remember which groups the model's loader comes back to, also if there is no plan."""
    try:
        plan = make_plan(model, infos, source, known)
    except PlanUnavailableError as error:
        state.deferred_groups |= error.deferred_groups
        raise
    state.deferred_groups |= plan.deferred_groups
    return plan


def known_copy_plan(state: EngineState, whole_model: bool = False) -> CopyPlan | None:
    """Where weights go, if it was learnt and experts have not moved since."""
    return None if whole_model else state.plans.copy_plan_on(placement(state.record))
