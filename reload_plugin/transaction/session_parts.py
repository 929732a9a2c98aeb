"""The collaborators of one session, and how they are wired to one another."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .. import vllm_api
from ..commit.strategies import STRATEGIES, CommitLog, CommitStrategy
from ..commit.undo_log import UndoLog
from ..device.host_memory import MemoryGauge
from ..device.ops import ops_for
from ..device.stream_order import WorkOrder
from ..load.admission import Admission
from ..load.completeness import Completeness
from ..load.destinations import StagingMemory
from ..load.overflow import Overflow
from ..load.tied_head import TiedHead
from ..plan.known_checkpoint import KnownCheckpoint
from ..plan.mismatches import Mismatches
from ..plan.tracer import LoadTrace
from ..record.model_record import ModelRecord
from ..record.model_view import EnterOptions, ModelView, staged_groups
from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage
from .accounting import Accounting
from .engine_state import EngineState
from .group_pipeline import GroupPipeline
from .group_processing import GroupProcessing
from .intake import Intake
from .load_format import LoadFormat
from .screening import Inspect, Screening
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
    strategy: type[CommitStrategy] | None = None
    """In place of the one that ``policy`` names."""


@dataclass(frozen=True, eq=False)
class SessionParts:
    """Each does one job; the session tells them when."""

    state: EngineState
    record: ModelRecord
    known: KnownCheckpoint
    trace: LoadTrace
    completeness: Completeness
    view: ModelView
    strategy: CommitStrategy
    log: CommitLog
    processing: GroupProcessing
    pipeline: GroupPipeline
    screening: Screening
    intake: Intake
    accounting: Accounting
    clock: StageClock
    gauge: MemoryGauge
    load_format: LoadFormat
    order: WorkOrder

    @property
    def all_by_copy_plan(self) -> bool:
        """Whether every weight goes by the copy plan, and no loader will look at the model."""
        copy_plan = self.completeness.copy_plan
        return self.known.planned and copy_plan is not None and not copy_plan.computed


def wire(model: nn.Module, state: EngineState, options: SessionOptions) -> SessionParts:
    """Make the collaborators of one session; nothing of the model is touched.

    Raises:
        KeyError: no strategy has the name of the policy.

    """
    record = state.record
    known = options.known or KnownCheckpoint()
    clock, gauge, mismatches = StageClock(), MemoryGauge(), Mismatches()
    trace = LoadTrace(mismatches, False, known.start_shapes, record.world_size > 1, known.is_later)
    completeness = Completeness(trace.loaded, mismatches, known)
    strategy_class = options.strategy or STRATEGIES[options.policy]
    ops = ops_for(record.target_device)
    waiting = strategy_class.waiting_bytes
    if not ops.on_host:  # a full device has less than the budget
        waiting = min(waiting, max(0, ops.free_bytes() // 2 - record.largest))
    admission = Admission(record, completeness, gauge, waiting)
    undo = UndoLog(record.target_device, state.pool.pinned) if strategy_class.has_undo_log else None
    graphs = vllm_api.captures_graphs(record.vllm_config)
    log = CommitLog(state.handles, state.native, ops.fence, record.late_bound, graphs, undo)
    strategy = strategy_class(log, gauge, admission, _Release(completeness, trace))
    view = _view_of(record, known, options, gauge, strategy)
    touching = functools.partial(_note_touched, log, completeness)
    memory = StagingMemory(completeness, trace, state.pool, touching)
    processing = GroupProcessing(state, strategy, log, clock)
    pipeline = GroupPipeline(
        model, state, view, trace, completeness, admission, strategy, processing, clock, options.whole_model
    )
    tied_head = TiedHead(record, known)
    screening = Screening(mismatches, admission, tied_head, options.overflow, options.inspect)
    intake = Intake(model, state, view, trace, completeness, memory, known, pipeline, clock, screening)
    accounting = Accounting(model, record, view, trace, completeness, known, pipeline)
    return SessionParts(
        state,
        record,
        known,
        trace,
        completeness,
        view,
        strategy,
        log,
        processing,
        pipeline,
        screening,
        intake,
        accounting,
        clock,
        gauge,
        LoadFormat(record, view, trace, completeness, pipeline, touching),
        WorkOrder(ops, functools.partial(_staging_of, view)),
    )


def _view_of(
    record: ModelRecord,
    known: KnownCheckpoint,
    options: SessionOptions,
    gauge: MemoryGauge,
    strategy: CommitStrategy,
) -> ModelView:
    groups = staged_groups(record, known.groups, gauge)
    plan, write_to_served = known.copy_plan, strategy.commits_each_group
    only_copies = known.planned and plan is not None and not plan.computed
    return ModelView(
        record,
        groups,
        EnterOptions(
            by_copy_plan=plan is not None,
            from_served=options.from_served,
            write_to_served=write_to_served,
            alias_served=write_to_served and only_copies,
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
        gone = group.remove_staging(keep)
        for storage in gone:
            self._trace.unwatch(storage)
        return gone


def _staging_of(view: ModelView) -> Iterator[torch.Tensor]:
    """A tensor over each storage that a session has allocated."""
    for group in view.groups:
        for storage in group.storages:
            if storage.materialised and not storage.is_served_memory:
                yield from itertools.islice(storage.views.values(), 1)


def _note_touched(log: CommitLog, completeness: Completeness, storage: StagedStorage) -> None:
    """Served memory is about to be written to."""
    log.before_write(*(memory for memory in (storage.served_memory,) if memory is not None))
    log.groups.add(completeness.group_of(storage.primary.name))
