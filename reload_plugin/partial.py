"""Partial updates: only the weights that come change, everything else keeps its exact value.

Layers are processed as a whole, so a layer that changes needs all its weights. Those that do not come are
read again from the source of the served generation, where it can still be read. Without one, a layer can
only take part if its served values are its load format: processing them once more has to change nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from torch import nn

from .errors import PartialUpdateError, SourceError, weights_error
from .generation import can_bring_back, expected, plan_for, session_for, whole_or_broken
from .interrupts import between
from .ledger import Expected
from .memory import HostPool
from .options import ReloadOptions
from .plan import Plan, PlanUnavailableError, make_plan
from .record import ModelRecord
from .session import SERVES_OLD, ReloadSession
from .sources import HostCopy, Overlay, Room, Source, SpillFile, Stream, TensorInfo
from .verify import ReloadReport


def reload_partially(
    model: nn.Module, record: ModelRecord, top: Source, options: ReloadOptions
) -> tuple[ReloadReport, Source | None]:
    """Change the weights that ``top`` holds and no others. All or nothing.

    Returns:
        The report, and the source that gives all of the served weights from now on, if there is one.

    Raises:
        PartialUpdateError: other weights of the same layers are needed and nobody has them; lists them.
        WeightsError: what came does not fit.

    """
    plan = _plan_of(model, record, top)
    touched = frozenset(plan.names_of_group)
    if not touched:
        raise SourceError(f"{top.description} holds no weight that the model uses. {SERVES_OLD}")
    tail = frozenset(group.name for group in record.groups if group.deferred or group.late)
    base = record.last_good if can_bring_back(model, record) else None
    if base is not None and getattr(base, "infos", None) is not None:
        return _over_base(model, record, base, top, touched | tail, options)
    return _over_served(model, record, top, plan, touched, tail, options), None


def _plan_of(model: nn.Module, record: ModelRecord, top: Source) -> Plan:
    infos = top.infos()
    if not infos:
        raise SourceError(f"{top.description} gave no weights, or cannot list them. {SERVES_OLD}")
    known = expected(model, record)
    try:
        plan = make_plan(
            model,
            infos,
            top.description,
            Expected(was_written=known.was_written, start_shapes=known.start_shapes),
        )
    except PlanUnavailableError as error:
        raise PartialUpdateError(
            f"This model's loader looks at values, so it is not known where a weight goes ({error}). "
            f"{SERVES_OLD} Send all weights."
        ) from error
    found = {kind: names for kind, names in vars(plan.problems).items() if kind != "missing" and names}
    if found:
        raise weights_error(top.description, SERVES_OLD, **found)
    return plan


def _over_base(
    model: nn.Module,
    record: ModelRecord,
    base: Source,
    top: Source,
    groups: frozenset[str],
    options: ReloadOptions,
) -> tuple[ReloadReport, Source | None]:
    """The layers that change, loaded from ``top`` and, for the rest of them, from ``base``."""
    whole = plan_for(model, record, base)
    if whole is None:
        raise PartialUpdateError(f"{base.description} cannot be planned. {SERVES_OLD} Send all weights.")
    sent = {info.name for info in top.infos() or ()}
    needed = frozenset().union(*(whole.names_of_group.get(group, frozenset()) for group in groups))
    companions = [name for name in whole.order if name in needed and name not in sent]
    merged = Overlay(Selected(base, companions), top)
    known = expected(model, record)
    limited = Expected(was_written=known.was_written, start_shapes=known.start_shapes, groups=groups)
    plan = make_plan(model, merged.infos(), merged.description, limited)
    plan.raise_problems(merged.description)
    chosen = Expected(plan.names_of_group, True, plan.routes, known.was_written, known.start_shapes, groups)
    with session_for(
        model, record, top.description, "staged", chosen, spill_dir=options.spill_dir
    ) as session:
        report = _finish(model, record, session, merged, plan.order, options)
    report = report.model_copy(update={"companions": len(companions)})
    return report, _absorbed(base, top)


def _over_served(
    model: nn.Module,
    record: ModelRecord,
    top: Source,
    plan: Plan,
    touched: frozenset[str],
    tail: frozenset[str],
    options: ReloadOptions,
) -> ReloadReport:
    """The layers that change, starting from the values they serve."""
    groups = touched | tail
    with session_for(
        model, record, top.description, "staged", Expected(groups=groups), from_served=True
    ) as rehearsal:
        unfit = rehearsal.rehearse()
    if unfit:
        _refuse(record, top, unfit)
    known = expected(model, record)
    chosen = Expected(plan.names_of_group, False, plan.routes, known.was_written, known.start_shapes, groups)
    with session_for(model, record, top.description, "staged", chosen, from_served=True) as session:
        return _finish(model, record, session, top, None, options, check=False)


def _finish(
    model: nn.Module,
    record: ModelRecord,
    session: ReloadSession,
    source: Source,
    order: Sequence[str] | None,
    options: ReloadOptions,
    check: bool = True,
) -> ReloadReport:
    session.weight_version, session.digest = options.weight_version, options.digest
    with whole_or_broken(model, record, session):
        with contextlib.closing(source.read(order, None, session.room_for)) as weights:
            session.load(weights, between)
        if session.problems:
            session.check()
        return session.finish(check).model_copy(update={"partial": True, "old_generation": "host"})


def _refuse(record: ModelRecord, top: Source, unfit: Iterable[str]) -> None:
    sent = {info.name for info in top.infos() or ()}
    learnt = record.learnt or {}
    companions: list[str] = []
    for group in record.groups:
        if group.name in unfit:
            names = learnt.get(group.name) or {t.name for t in group.tensors if t.is_parameter}
            companions += sorted(names - sent)
    shown = ", ".join(companions[:12]) + (f" and {len(companions) - 12} more" if len(companions) > 12 else "")
    raise PartialUpdateError(
        f"{top.description} changes layers that are packed or quantized, and their other weights are not in "
        f"memory in the form they came in. {SERVES_OLD} Send these as well: {shown}. Or reload once in full "
        "with keep_load_format='host' or 'spill', or from a folder that stays where it is.",
        companions,
    )


class Selected:
    """Some of a source's weights."""

    def __init__(self, source: Source, names: Iterable[str]) -> None:
        self.description = source.description
        self._source = source
        self._names = list(names)

    def infos(self) -> Sequence[TensorInfo]:
        wanted = set(self._names)
        return [info for info in self._source.infos() or () if info.name in wanted]

    def read(
        self, order: Sequence[str] | None = None, pool: HostPool | None = None, room: Room | None = None
    ) -> Stream:
        yield from self._source.read(self._names if order is None else order, pool, room)

    def unchanged(self) -> bool:
        return self._source.unchanged()


def _absorbed(base: Source, top: Source) -> Source:
    """A source of the served weights after ``top`` went over ``base``; as few layers as possible."""
    if isinstance(base, Overlay) and isinstance(base.top, (HostCopy, SpillFile)):
        _add_all(base.top, top)
        return base
    if isinstance(base, (HostCopy, SpillFile)):
        _add_all(base, top)
        return base
    return Overlay(base, top)


def _add_all(kept: HostCopy | SpillFile, top: Source) -> None:
    for name, tensor in top.read():
        kept.add(name, tensor)
    if isinstance(top, (HostCopy, SpillFile)):
        top.close()
