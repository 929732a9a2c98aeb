"""Choosing the policy of a reload."""

from __future__ import annotations

from torch import nn

from ..device.ops import ops_for
from ..errors import SERVES_OLD, ReloadError
from ..options import POLICIES, Policy, ReloadOptions
from ..plan.checkpoint_plan import Plan
from ..ranks.votes import ranks_of
from .engine_state import EngineState
from .rollback import has_rollback_source


def policy_for_source(
    model: nn.Module, state: EngineState, plan: Plan | None, chosen: ReloadOptions
) -> Policy:
    """The policy for weights that can be listed and read again.

    Raises:
        ReloadError: the policy needs a rollback source, and there is none.

    """
    if chosen.policy == "auto":
        alone = _voters(state) == 1 and not chosen.whole_model
        reads_again = plan is not None and alone and has_rollback_source(model, state)
        return POLICIES["reread" if reads_again else "host"]
    policy = POLICIES[chosen.policy]
    _require_rollback_source(model, state, policy)
    return POLICIES["reread"] if policy.rollback == "spill" else policy  # they are in a file already


def policy_for_iterator(model: nn.Module, state: EngineState, chosen: ReloadOptions) -> Policy:
    """The policy for weights that come once.

    Raises:
        ReloadError: the policy needs weights in files, or a rollback source that is not there.

    """
    if chosen.policy == "reread":
        raise ReloadError(
            "policy='reread' needs weights in files, and an iterator can be read once only. "
            f"{SERVES_OLD} Use 'spill', which writes them to a file first, or 'host'."
        )
    if chosen.policy != "auto":
        policy = POLICIES[chosen.policy]
        _require_rollback_source(model, state, policy)
        return policy
    if chosen.whole_model or _voters(state) > 1:
        return POLICIES["host"]
    needed = sum(group.nbytes for group in state.record.groups)
    crowded = ops_for(state.record.target_device).free_bytes() < needed + needed // 4
    return POLICIES["spill" if crowded and has_rollback_source(model, state) else "host"]


def require_one_rank(state: EngineState, chosen: ReloadOptions) -> None:
    """Raises ReloadError for a policy that commits group by group, where several ranks have to commit
    together.
    """
    ranks = _voters(state)
    if chosen.policy not in ("auto", "host") and ranks > 1:
        raise ReloadError(
            f"policy={chosen.policy!r} commits layer by layer, and {ranks} ranks can commit together "
            f"under 'host' only. {SERVES_OLD}"
        )


def _voters(state: EngineState) -> int:
    """Ranks that have to commit together, those of other engines included."""
    return ranks_of(state.record) if state.vote is None else state.vote.ranks


def _require_rollback_source(model: nn.Module, state: EngineState, policy: Policy) -> None:
    if policy.needs_rollback_source and not has_rollback_source(model, state):
        raise ReloadError(
            f"policy={policy.name!r} needs the served weights in a place where they can be read again, and "
            f"there is none. {SERVES_OLD} Reload under policy='host', once with keep_load_format='spill' or "
            "from a folder that stays where it is."
        )
