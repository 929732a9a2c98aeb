"""Choosing the policy of a reload: where the old weights are until the new ones are whole."""

from __future__ import annotations

from torch import nn

from ..commit.strategies import StrategyName
from ..device.available_memory import available
from ..device.ops import ops_for
from ..errors import SERVES_OLD, ReloadError
from ..options import POLICIES, POLICY_OF_CPU, Policy, ReloadOptions
from ..plan.checkpoint_plan import Plan
from ..ranks.votes import ranks_of
from .engine_state import EngineState
from .rollback import has_rollback_source


def policy_for_source(
    model: nn.Module, state: EngineState, plan: Plan | None, chosen: ReloadOptions
) -> Policy:
    """The policy for weights that can be listed and read again.

    Raises:
        ReloadError: the policy needs a rollback source, and there is none; or memory that is not there.

    """
    if chosen.policy == "auto":
        if state.broken is not None and not _serves_from_host(state):
            return POLICIES["streaming"]  # there is nothing to go back to
        alone = _voters(state) == 1 and not chosen.whole_model
        reads_again = plan is not None and alone and has_rollback_source(model, state)
        return POLICIES["reread"] if reads_again else _in_memory(state)
    policy = _named(state, chosen.policy)
    _require_rollback_source(model, state, policy)
    return POLICIES["reread"] if policy.rollback == "spill" else policy  # they are in a file already


def policy_for_iterator(model: nn.Module, state: EngineState, chosen: ReloadOptions) -> Policy:
    """The policy for weights that come once.

    Raises:
        ReloadError: the policy needs weights in files, or a rollback source or memory that is not there.

    """
    if chosen.policy == "reread":
        raise ReloadError(
            "policy='reread' needs weights in files, and an iterator can be read once only. "
            f"{SERVES_OLD} Use 'spill', which writes them to a file first, or 'host'."
        )
    if chosen.policy != "auto":
        policy = _named(state, chosen.policy)
        _require_rollback_source(model, state, policy)
        return policy
    if _serves_from_host(state):
        if chosen.whole_model or _voters(state) > 1:
            return POLICY_OF_CPU
        crowded = not _fits(ops_for(state.record.target_device).free_bytes(), _needed(state))
        return POLICIES["spill"] if crowded and has_rollback_source(model, state) else POLICY_OF_CPU
    return _in_memory(state) if state.broken is None else POLICIES["streaming"]


def strategy_between_calls(state: EngineState, policy: Policy | None = None) -> StrategyName:
    """The strategy for an update that lets the engine serve between its calls: results wait beside the served
    weights where there is room by ``policy``, else in host memory.
    """
    on_device = policy is not None and policy.rollback == "device" and state.parked is None
    beside = _serves_from_host(state) or on_device
    return "staged" if beside else "prepared"


def require_one_rank(state: EngineState, chosen: ReloadOptions) -> None:
    """Raises ReloadError for a policy that commits group by group without an undo log, where several ranks
    have to commit together.
    """
    ranks = _voters(state)
    if chosen.policy not in ("auto", "host", "device") and ranks > 1:
        raise ReloadError(
            f"policy={chosen.policy!r} commits layer by layer, and {ranks} ranks can commit together "
            f"under 'host' only. {SERVES_OLD}"
        )


def _voters(state: EngineState) -> int:
    """Ranks that have to commit together, those of other engines included."""
    return ranks_of(state.record) if state.vote is None else state.vote.ranks


def _named(state: EngineState, name: str) -> Policy:
    if name in ("host", "device") and _serves_from_host(state):
        return POLICY_OF_CPU
    if name == "device" and state.parked is not None:
        return POLICIES["host"]  # the old weights are there
    return POLICIES[name]


def _in_memory(state: EngineState) -> Policy:
    """Where a copy of the served weights fits: on the device, else in host memory.

    Raises:
        ReloadError: nowhere.

    """
    if _serves_from_host(state):
        return POLICY_OF_CPU
    needed = _needed(state)
    on_device, on_host = ops_for(state.record.target_device).free_bytes(), available()
    if _fits(on_device, needed) and state.parked is None:
        return POLICIES["device"]
    # One rank sees the memory of all: each of them may be the last to look.
    if _fits(on_host // ranks_of(state.record), needed):
        return POLICIES["host"]
    raise ReloadError(
        f"The old weights need {needed:,} bytes until the new ones are whole, and neither the device "
        f"({on_device:,} bytes free) nor the host ({on_host:,} bytes free) has them. {SERVES_OLD} Free "
        "memory, or choose policy='reread' or 'spill' (old weights in files) or 'streaming' (no way back)."
    )


def _serves_from_host(state: EngineState) -> bool:
    return ops_for(state.record.target_device).on_host


def _needed(state: EngineState) -> int:
    return sum(group.nbytes for group in state.record.groups)


def _fits(free: int, needed: int) -> bool:
    """Whether a copy fits, with a margin for what else allocates meanwhile."""
    return free >= needed + needed // 4


def _require_rollback_source(model: nn.Module, state: EngineState, policy: Policy) -> None:
    if policy.needs_rollback_source and not has_rollback_source(model, state):
        raise ReloadError(
            f"policy={policy.name!r} needs the served weights in a place where they can be read again, and "
            f"there is none. {SERVES_OLD} Reload under policy='host', once with keep_load_format='spill' or "
            "from a folder that stays where it is."
        )
