"""Partial updates: only the weights that are sent change, everything else keeps its exact value.

Layers are processed as a whole. So the weights of these layers that were not sent are read again from the
source of the served generation, if it can still be read: the update is a reload of some layers from an
overlay of two sources. Without such a source only layers that processing leaves unchanged can be updated,
starting from the served values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from ..checkpoint import DummyWeights, HostCopy, Overlay, Source, SpillFile, close_source, spill_to_file
from ..errors import SERVES_OLD, PartialUpdateError, SourceError, weights_error
from ..interrupts import call_between
from ..load.progress import with_progress
from ..options import ReloadOptions
from ..plan.checkpoint_plan import Plan, PlanUnavailableError
from ..plan.known_checkpoint import KnownCheckpoint
from ..record.model_record import LayerRecord, ModelRecord
from ..report import ReloadReport
from .engine_state import EngineState
from .known import known_checkpoint, known_copy_plan, plan_listing, session_for
from .policies import strategy_between_calls
from .rehearsal import Rehearsal
from .rollback import has_rollback_source, rollback_on_failure
from .session_report import ReportFacts

SMALL_UPDATE = 64 << 20
"""Bytes of partial updates that are kept in memory; more are spilled to a file."""


def base_of(model: nn.Module, state: EngineState) -> Source | None:
    """The source of the weights that are not sent; None if it cannot be read again."""
    base = state.rollback_source if has_rollback_source(model, state) else None
    return None if base is None or isinstance(base, DummyWeights) else base


def overlay_update(
    model: nn.Module, state: EngineState, base: Source, top: Source
) -> tuple[Overlay, frozenset[str] | None]:
    """The overlay of ``top`` on ``base``, and the groups that ``top`` changes: none where all of ``top`` is
    for other ranks. The groups are None if they are not known, because the model's loader delays weights or
    combines several.

    Raises:
        WeightsError: some weights of ``top`` do not fit or are not used.

    """
    changed = _known_groups(state, top)
    if changed is None:
        plan = _plan_of(model, state, top)
        changed = frozenset(plan.names_of_group) or (frozenset() if _uses_none(plan) else None)
    return Overlay(base, top), changed


def _known_groups(state: EngineState, top: Source) -> frozenset[str] | None:
    """The groups that the weights are written to; None if the known copy plan does not have them all."""
    copy_plan, infos = known_copy_plan(state), {info.name: info for info in top.infos() or ()}
    for name, info in infos.items():
        tensor_plan = copy_plan.of.get(name) if copy_plan is not None else None
        if tensor_plan is None or (tensor_plan.shape, tensor_plan.dtype) != (info.shape, info.dtype):
            return None
    found = {
        group: names
        for group, names in state.plans.names_of_group.items()
        if not names.isdisjoint(infos.keys())
    }
    return frozenset(found) if found and infos.keys() <= frozenset().union(*found.values()) else None


def groups_to_load(record: ModelRecord, plan: Plan, changed: frozenset[str]) -> frozenset[str] | None:
    """The groups that have to be loaded and processed so that the ``changed`` ones get new values.

    These are the changed groups; the tail of PWAL (attention layers and what the model's own hook changes),
    which reads other layers; groups that share a weight with one of these; and layers around or inside one of
    these that processing changes as well (experts and their quant method).

    Args:
        record: of the model.
        plan: of all weights of the new generation.
        changed: names of the groups that weights of the update go to.

    Returns:
        None when all groups have to be, because the copy plan is not known.

    """
    names_of = plan.names_of_group
    if plan.copy_plan is None or not changed <= names_of.keys():
        return None
    found = changed | _processed_last(record)
    while True:
        names = frozenset().union(*(names_of.get(group, frozenset()) for group in found))
        sharing = {group for group, theirs in names_of.items() if not theirs.isdisjoint(names)}
        more = found | sharing | _processed_with(record, found | sharing)
        if more == found:
            return found
        found = more


def _processed_last(record: ModelRecord) -> frozenset[str]:
    """Groups of the tail of PWAL, which vLLM processes after all others."""
    return frozenset(group.name for group in record.groups if group.deferred or group.late)


def _processed_with(record: ModelRecord, groups: frozenset[str]) -> frozenset[str]:
    """Groups with a layer around or inside a layer of ``groups``, where processing changes both layers."""
    owned = [(layer.name, group.name) for group in record.groups for layer in group.layers if layer.effect]
    group_of = {layer: group for layer, group in owned if layer}
    pairs = [
        (group_of[layer], group_of[outer])
        for layer in group_of
        for outer in _enclosing_modules(layer)
        if outer in group_of
    ]
    return frozenset(one for pair in pairs for one in pair if not groups.isdisjoint(pair))


def _enclosing_modules(layer: str) -> Iterator[str]:
    """The names of the modules around a layer, innermost first, without the model itself."""
    while "." in layer:
        layer = layer.rpartition(".")[0]
        yield layer


def update_in_place(
    model: nn.Module, state: EngineState, top: Source, options: ReloadOptions
) -> ReloadReport:
    """Update layers that processing leaves unchanged, starting from the served values.

    Raises:
        PartialUpdateError: other weights of the same layers are needed and cannot be read; lists them.
        WeightsError: some weights do not fit.

    """
    plan = _plan_of(model, state, top)
    touched = frozenset(plan.names_of_group)
    if not touched and not _uses_none(plan):
        raise PartialUpdateError(
            "This model's loader delays weights or combines several, so it is not known which layers they "
            f"change, and the other weights cannot be read again. {SERVES_OLD} Send all weights."
        )
    last = _processed_last(state.record)
    unfit = _changed_by_processing(state.record, touched)
    if not unfit:
        unfit = Rehearsal(model, state, touched | last).changed_groups()
    if unfit:
        _refuse(state, top, unfit)
    known = known_checkpoint(model, state)
    chosen = KnownCheckpoint(
        plan.names_of_group, False, plan.copy_plan, known.was_written, known.start_shapes, touched | last
    )
    strategy = strategy_between_calls(state)
    with session_for(model, state, top.description, strategy, chosen, from_served=True) as session:
        session.agree = state.vote
        session.weight_version, session.digest = options.weight_version, options.digest
        session.facts = ReportFacts(sent=len(top.infos() or ()))
        with rollback_on_failure(model, state, session):
            reading = with_progress(
                top.read(None, None, session.parts.intake.destinations), top, options.progress
            )
            with contextlib.closing(reading) as weights:
                session.load(weights, call_between)
            if session.mismatches:
                session.parts.accounting.check(session.source)
            return session.finish(check=False)


def _changed_by_processing(record: ModelRecord, groups: frozenset[str]) -> list[str]:
    """The groups in ``groups`` whose tensors, or whose quant method, processing changes."""
    changed = [layer.name for group in record.groups for layer in group.layers if layer.effect]

    def is_changed(layer: LayerRecord) -> bool:
        return any(name == layer.name or name.startswith(layer.name + ".") for name in changed)

    return [
        group.name
        for group in record.groups
        if group.name in groups and any(layer.tensors and is_changed(layer) for layer in group.layers)
    ]


def _plan_of(model: nn.Module, state: EngineState, top: Source) -> Plan:
    infos = top.infos()
    if not infos:
        raise SourceError(f"{top.description} gave no weights, or cannot list them. {SERVES_OLD}")
    try:
        plan = plan_listing(model, state, infos, top.description, state.start.known(model, state.record))
    except PlanUnavailableError as error:
        raise PartialUpdateError(
            f"This model's loader reads values, so it is not known where a weight is written ({error}). "
            f"{SERVES_OLD} Send all weights."
        ) from error
    found = {kind: names for kind, names in vars(plan.mismatches).items() if kind != "missing" and names}
    if found:
        raise weights_error(top.description, SERVES_OLD, **found)
    if _uses_none(plan) and not _is_spread(state.record):
        raise SourceError(f"{top.description} holds no weight that the model uses. {SERVES_OLD}")
    return plan


def _uses_none(plan: Plan) -> bool:
    """Whether this rank uses none of the weights: all may be of other pipeline stages, or other ranks'
    experts. It takes part in the update all the same, as every rank does.
    """
    return all(written == "none" for written in plan.coverage.values())


def _is_spread(record: ModelRecord) -> bool:
    """Whether there may be weights that other ranks use and this one does not."""
    parallel = getattr(record.vllm_config, "parallel_config", None)
    stages = getattr(parallel, "pipeline_parallel_size", 1)
    return stages > 1 or getattr(parallel, "enable_expert_parallel", False)


def _refuse(state: EngineState, top: Source, unfit: Iterable[str]) -> None:
    sent = {info.name for info in top.infos() or ()}
    names_of_group = state.plans.names_of_group
    companions: list[str] = []
    for group in state.record.groups:
        if group.name in unfit:
            names = names_of_group.get(group.name) or {t.name for t in group.tensors if t.is_parameter}
            companions += sorted(names - sent)
    shown = ", ".join(companions[:12]) + (f" and {len(companions) - 12} more" if len(companions) > 12 else "")
    further = f"Send these as well: {shown}. Or reload" if companions else "Reload"
    raise PartialUpdateError(
        f"{top.description} changes layers that are packed or quantized, and their other weights are not "
        f"kept in checkpoint format. {SERVES_OLD} {further} once in full "
        "with keep_load_format='host' or 'spill', or from a folder that stays where it is.",
        companions,
    )


def merge_updates(served: Overlay, folder: str | None = None) -> Source:
    """The same weights in fewer sources: merges the last update with the one before it.

    Args:
        served: the last update is the last source. Sources that were merged are closed.
        folder: of a spill file, if one is needed.

    Raises:
        SourceError: the disk is full; ``served`` is unchanged.

    """
    *lower, top = served.sources
    if lower and isinstance(kept := lower[-1], (HostCopy, SpillFile)):
        if len(lower) == 1:
            _add_all(kept, top)  # it contains all weights, so it does not grow
            joined = kept
        else:
            joined = _together(kept, top, folder)
        for source in (kept, top):
            if source is not joined:
                close_source(source)
        lower, top = lower[:-1], joined
    return Overlay(*lower, top) if lower else top


def _together(kept: HostCopy | SpillFile, top: Source, folder: str | None) -> HostCopy | SpillFile:
    """The weights of two updates, in a file above ``SMALL_UPDATE`` bytes: any number of updates may
    follow.
    """
    nbytes = kept.nbytes + sum(info.nbytes for info in top.infos() or ())
    if isinstance(kept, SpillFile) or nbytes <= SMALL_UPDATE:
        _add_all(kept, top)
        return kept
    file = spill_to_file(kept, folder)
    try:
        _add_all(file, top)
    except BaseException:
        file.close()
        raise
    return file


def _add_all(kept: HostCopy | SpillFile, top: Source) -> None:
    for name, tensor in top.read():
        kept.add(name, tensor)
