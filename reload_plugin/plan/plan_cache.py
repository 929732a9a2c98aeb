"""What was learnt about the weights of one model, kept from reload to reload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .checkpoint_plan import Plan
from .copy_plan import CopyPlan
from .source import TensorInfo


class PlanCache:
    """Plans of one model; each is valid for one listing of weights and one placement of the model's parts.

    A plan is looked up by both, and never by a name: a folder may hold other weights by then, and experts may
    have moved.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._names_of_group: dict[str, frozenset[str]] | None = None
        self._copy_plan: CopyPlan | None = None
        self._arrived: list[TensorInfo] | None = None
        """What the last reload through the model's loader brought."""
        self._tried: tuple[object, Sequence[TensorInfo]] | None = None
        """The placement and the listing that a copy plan was last wanted for; they are not tried twice."""

    # -- plans of listings -------------------------------------------------------------------------

    def plan_of(self, infos: Sequence[TensorInfo], placement: object) -> Plan | None:
        """The kept plan, if it was made for exactly these tensors on this placement."""
        plan = self._plan
        return plan if plan is not None and plan.is_of(infos, placement) else None

    def keep(self, plan: Plan) -> None:
        """Keep the plan of the last checkpoint that could be listed."""
        self._plan = plan

    # -- what the last good reload taught ----------------------------------------------------------

    @property
    def names_of_group(self) -> Mapping[str, frozenset[str]]:
        """Group name -> weights that went into it at the last good reload."""
        return self._names_of_group or {}

    @property
    def copy_plan(self) -> CopyPlan | None:
        """The copy plan of the last good reload, for whatever placement."""
        return self._copy_plan

    def copy_plan_on(self, placement: object) -> CopyPlan | None:
        """The copy plan, if it was learnt on this placement."""
        plan = self._copy_plan
        return plan if plan is not None and plan.key == placement else None

    def learn(self, plan: Plan) -> None:
        """Weights like those of a plan were loaded, or will be."""
        self._names_of_group, self._copy_plan = dict(plan.names_of_group), plan.copy_plan

    def learn_by_loader(self, names_of_group: dict[str, frozenset[str]], arrived: list[TensorInfo]) -> None:
        """A reload went through the model's own loader: it tells which weights go into which group, and what
        to make a copy plan for next time.
        """
        if self._copy_plan is not None:
            self._tried = None
        self._names_of_group, self._copy_plan, self._arrived = names_of_group, None, arrived

    # -- when to make a copy plan ------------------------------------------------------------------

    def last_listing(self) -> Sequence[TensorInfo] | None:
        """What the last reload brought, if there was one."""
        if self._copy_plan is not None:
            return [TensorInfo(name, one.shape, one.dtype) for name, one in self._copy_plan.of.items()]
        return self._arrived

    def was_tried_on(self, placement: object) -> bool:
        """Whether a copy plan was wanted on this placement before, for any listing."""
        return self._tried is not None and self._tried[0] == placement

    def begin_try(self, placement: object, infos: Sequence[TensorInfo]) -> bool:
        """Whether a copy plan for this listing and placement is to be tried; it is not a second time."""
        if self._tried == (placement, infos):
            return False
        self._tried = placement, infos
        return True
