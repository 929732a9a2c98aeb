"""Where each checkpoint tensor goes, learnt by running the model's own loader on meta tensors.

Nothing is read and nothing is written: the served weights stay where they are, and a checkpoint that
does not fit is refused here. A plan holds no storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..device.gc_pause import gc_paused
from ..errors import SERVES_OLD, ReloadError, SourceError, weights_error
from ..record.model_record import complete_record_of
from ..record.placement import placement
from ..transaction.old_session import ReloadSession
from .arrivals import Loaded
from .copy_plan import CopyPlan
from .known_checkpoint import KnownCheckpoint
from .mismatches import Mismatches
from .source import TensorInfo

_AT_A_TIME = 1000
"""Tensors on meta that a plan has at one time, unless the loader collects them."""


class PlanUnavailableError(Exception):
    """The model's loader looks at values, so it cannot be run on meta tensors."""


@dataclass(frozen=True)
class Plan:
    """What a checkpoint would do to a model."""

    infos: dict[str, TensorInfo]
    order: tuple[str, ...] = field(repr=False)
    """Names in the order in which the layers need them."""
    names_of_group: dict[str, frozenset[str]] = field(repr=False)
    """Group name -> every weight that goes into it; empty for loaders that collect weights first."""
    coverage: dict[str, str]
    """Parameter -> ``whole``, ``part`` or ``none``."""
    copy_plan: CopyPlan | None
    """How to load it without the model's loader; None when the loader has to run."""
    placement: object
    mismatches: Mismatches
    kept: dict[str, str]
    ignored: dict[str, str]

    @property
    def staging_bytes(self) -> int:
        """Bytes of the checkpoint, an upper bound of what it needs in load format."""
        return sum(info.meta().nbytes for info in self.infos.values())

    def is_of(self, infos: Iterable[TensorInfo], placement: object) -> bool:
        """Whether the plan was made for exactly these tensors on this placement."""
        return self.placement == placement and list(self.infos.values()) == list(infos)

    def raise_mismatches(self, source: str) -> None:
        """Raise WeightsError with every offender, if there is one."""
        if self.mismatches:
            raise weights_error(source, SERVES_OLD, **vars(self.mismatches))


def make_plan(
    model: nn.Module,
    infos: Iterable[TensorInfo],
    source: str,
    expected: KnownCheckpoint | None = None,
) -> Plan:
    """Trace the model's loader over ``infos``. Touches neither storage nor served weights.

    Args:
        model: a recorded model.
        infos: names, shapes and dtypes of the checkpoint.
        source: what to call it in messages.
        expected: what is known of the checkpoint the engine started with.

    Raises:
        PlanUnavailableError: the loader needs values.

    """
    listed: Sequence[TensorInfo] = list(infos)
    if not listed:
        raise SourceError(f"{source} holds no tensors. {SERVES_OLD}")
    with gc_paused():
        with ReloadSession(model, source=source, dry=True, expected=expected) as session:
            try:
                session.load(_without_values(listed))
            except (NotImplementedError, ReloadError) as error:
                raise PlanUnavailableError(str(error)) from error
            if any("meta" in reason for reason in session.mismatches.misshapen.values()):
                raise PlanUnavailableError(next(iter(session.mismatches.misshapen.values())))
            kept, ignored = session.account()
            coverage, copy_plan = session.completeness.coverage(), session.copy_plan()
        if copy_plan is not None and not _does_the_same_alone(model, listed, session.loaded, expected):
            session.loaded.repeatable, copy_plan = False, None
        return _plan(model, listed, session, coverage, copy_plan, kept, ignored)


def _does_the_same_alone(
    model: nn.Module, infos: Sequence[TensorInfo], together: Loaded, expected: KnownCheckpoint | None
) -> bool:
    """Whether the loader, given nothing but one of the weights that take it at each reload, writes what it
    wrote when that one came among all others: it may have had that from elsewhere, like the zeros for biases
    that vLLM's GLM-ASR writes when a part of the model is over and the first weight of the next has come.
    """
    alone = [info for info in infos if info.name in together.computed]
    if not alone:
        return True
    with ReloadSession(model, dry=True, expected=expected) as session:
        for info in alone:
            try:
                session.load(_without_values([info]))
            except (NotImplementedError, ReloadError):
                return False
        return session.loaded.computed == together.computed and not session.mismatches


def _without_values(infos: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors on meta. Only some at a time: each takes as much memory as all that is learnt of it."""
    for first in range(0, len(infos), _AT_A_TIME):
        with _disable_current_modes():
            some = [(info.name, info.meta()) for info in infos[first : first + _AT_A_TIME]]
        yield from some


def _plan(
    model: nn.Module,
    infos: Sequence[TensorInfo],
    session: ReloadSession,
    coverage: dict[str, str],
    copy_plan: CopyPlan | None,
    kept: dict[str, str],
    ignored: dict[str, str],
) -> Plan:
    record, written = complete_record_of(model), session.loaded.written
    first: dict[str, int] = {}
    members: dict[int, set[str]] = {}
    for info in infos:
        indices = {record.group_of[parameter] for parameter in written.get(info.name, ())}
        first[info.name] = min(indices, default=-1)
        for index in indices:
            members.setdefault(index, set()).add(info.name)
    repeatable = session.loaded.repeatable
    # Layer by layer; but a loader that keeps weights back may be one that minds what comes after what.
    order = sorted(first, key=first.__getitem__) if repeatable else list(first)
    known = {record.groups[index].name: frozenset(members.pop(index)) for index in list(members)}
    return Plan(
        infos={info.name: info for info in infos},
        order=tuple(order),
        names_of_group=known if repeatable else {},
        coverage=coverage,
        copy_plan=copy_plan,
        placement=placement(record),
        mismatches=session.mismatches,
        kept=kept,
        ignored=ignored,
    )
