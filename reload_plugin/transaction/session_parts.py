"""The collaborators of one session, and how they are wired to one another."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn

from ..commit.strategies import STRATEGIES, CommitLog, CommitStrategy
from ..device.host_memory import MemoryGauge
from ..load.admission import Admission
from ..load.completeness import Completeness
from ..load.destinations import StagingMemory
from ..load.overflow import Overflow
from ..plan.known_checkpoint import KnownCheckpoint
from ..plan.mismatches import Mismatches
from ..plan.tracer import LoadTrace
from ..record.model_record import ModelRecord
from ..record.model_view import EnterOptions, ModelView
from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage
from ..tensors import storage_id
from ..verify.untouched_layers import UntouchedLayers
from .accounting import Accounting, world_size
from .group_pipeline import GroupPipeline
from .intake import Inspect, Intake
from .stage_clock import StageClock


@dataclass(frozen=True)
class SessionOptions:
    """What the caller of a session chose; see ``ReloadSession``."""

    policy: str = "staged"
    whole_model: bool = False
    known: KnownCheckpoint | None = None
    overflow: Overflow | None = None
    inspect: Inspect | None = None
    from_served: bool = False


@dataclass(frozen=True, eq=False)
class SessionParts:
    """Each does one job; the session tells them when."""

    record: ModelRecord
    known: KnownCheckpoint
    trace: LoadTrace
    completeness: Completeness
    view: ModelView
    strategy: CommitStrategy
    log: CommitLog
    pipeline: GroupPipeline
    intake: Intake
    accounting: Accounting
    clock: StageClock
    gauge: MemoryGauge

    @property
    def all_by_copy_plan(self) -> bool:
        """Whether every weight goes by the copy plan, and no loader will look at the model."""
        copy_plan = self.completeness.copy_plan
        return self.known.planned and copy_plan is not None and not copy_plan.computed

    def enter(self) -> bool:
        """Put the load format on the live model. Returns whether that was the first time."""
        if not self.view.show():
            return False
        for group in self.view.groups:
            self.trace.watch(group.storages)
            self.completeness.admit(group)
        self.pipeline.begin()
        return True

    def protect(self, untouched: UntouchedLayers) -> None:
        """Have the trace keep loaders away from everything that is served."""
        self.trace.find_protected = functools.partial(_served_storages, self.view, untouched)

    def drop(self) -> None:
        """Forget everything that is not served; the view has to be hidden."""
        self.view.drop()
        self.pipeline.forget()
        self.trace.storages, self.trace.complete = {}, {}
        self.trace.find_protected = dict


def wire(model: nn.Module, record: ModelRecord, options: SessionOptions) -> SessionParts:
    """Make the collaborators of one session; nothing of the model is touched.

    Raises:
        KeyError: no strategy has the name of the policy.

    """
    known = options.known or KnownCheckpoint()
    clock, gauge, mismatches = StageClock(), MemoryGauge(), Mismatches()
    trace = LoadTrace(mismatches, False, known.start_shapes, world_size(record) > 1, known.is_later)
    completeness = Completeness(trace.loaded, mismatches, known)
    strategy_class = STRATEGIES[options.policy]
    admission = Admission(record, completeness, gauge, strategy_class.waiting_bytes)
    log = CommitLog(record.handles, record.native)
    strategy = strategy_class(log, gauge, admission, _Release(completeness, trace))
    view = _view_of(record, known, options, gauge, strategy)
    touching = functools.partial(_note_touched, log.groups, completeness)
    trace.touching = touching
    memory = StagingMemory(completeness, trace, record.pool, touching)
    pipeline = GroupPipeline(
        model, record, view, trace, completeness, admission, strategy, log, clock, options.whole_model
    )
    intake = Intake(
        model,
        record,
        view,
        trace,
        completeness,
        admission,
        memory,
        known,
        pipeline,
        clock,
        options.overflow,
        options.inspect,
    )
    accounting = Accounting(model, record, view, trace, completeness, known, pipeline)
    return SessionParts(
        record,
        known,
        trace,
        completeness,
        view,
        strategy,
        log,
        pipeline,
        intake,
        accounting,
        clock,
        gauge,
    )


def _view_of(
    record: ModelRecord,
    known: KnownCheckpoint,
    options: SessionOptions,
    gauge: MemoryGauge,
    strategy: CommitStrategy,
) -> ModelView:
    chosen = known.groups
    shared = _shared_tensors(record)
    groups = [
        StagedGroup(group, record.target_device, shared, gauge)
        for group in record.groups
        if chosen is None or group.name in chosen
    ]
    plan, straight = known.copy_plan, strategy.commits_each_group
    only_copies = known.planned and plan is not None and not plan.computed
    return ModelView(
        record,
        groups,
        EnterOptions(
            by_copy_plan=plan is not None,
            from_served=options.from_served,
            straight=straight,
            alias_served=straight and only_copies,
        ),
    )


class _Release:
    """Takes from a group the staging that its result does not need.

    A class and no closure over the session, which would keep the session alive with what it holds.
    """

    def __init__(self, completeness: Completeness, trace: LoadTrace) -> None:
        self._completeness, self._trace = completeness, trace

    def __call__(self, group: StagedGroup, keep: set[int]) -> list[StagedStorage]:
        """Returns the storages that a pool may have again: none where a loader may hold views of them."""
        if self._completeness.copy_plan is None:
            group.release(keep)
            return []
        gone = group.let_go(keep)
        for storage in gone:
            self._trace.storages.pop(storage.key, None)
        return gone


def _shared_tensors(record: ModelRecord) -> frozenset[int]:
    """Tensors (by record) that several groups hold and that are nobody's parameter: left alone."""
    seen: set[int] = set()
    shared: set[int] = set()
    for group in record.groups:
        own = {id(t) for t in group.tensors}
        shared |= own & seen
        seen |= own
    return frozenset(shared)


def _note_touched(committed: set[str], completeness: Completeness, storage: StagedStorage) -> None:
    """Served memory is about to be written to."""
    committed.add(completeness.group_of(storage.primary.name))


def _served_storages(view: ModelView, untouched: UntouchedLayers) -> dict[int, str]:
    """Storages of everything that is served, to keep loaders away from them."""
    found = dict(untouched.storages)
    for group in view.groups:
        for path, tensor in group.served_tensors():
            found[storage_id(tensor) or 0] = path
    staged = {storage.key for group in view.groups for storage in group.storages}
    return {key: name for key, name in found.items() if key and key not in staged}
