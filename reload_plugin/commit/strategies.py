"""When the new values of a group become the served ones.

A reload chooses its strategy once, by name in ``STRATEGIES``; no other code compares names.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, Literal

import torch

from ..device.host_copies import HostCopies
from ..device.host_memory import MemoryGauge
from ..load.admission import Admission
from ..load.overflow import OPEN_BUDGET, OPEN_STREAMING
from ..process.native_handles import Handles, forget_handles
from ..record.late_bound import LateBound
from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage
from .compare import plan_commit
from .graph_guard import refuse_stale_graphs, refuse_unmakeable
from .group_commit import Commit
from .undo_log import UndoLog

StrategyName = Literal["staged", "streaming", "undo", "prepared"]


class CommitLog:
    """Applies commits, and records what was committed.

    Args:
        handles: known native handles of the model.
        native: group name -> memory that the group's native handles point into, of the model.
        fence: waits until the device has done all work that was queued, on every stream.
        late: attributes that the first forward pass sets.
        graphs: whether graphs were captured, which have addresses and numbers baked in.
        undo: saves what is overwritten; None where nothing is to be saved.

    """

    def __init__(
        self,
        handles: Handles,
        native: dict[str, list[torch.Tensor]],
        fence: Callable[[], None],
        late: LateBound,
        graphs: bool,
        undo: UndoLog | None = None,
    ) -> None:
        self._late = late
        self._graphs = graphs
        self._planned = False
        self.groups: set[str] = set()
        """Names of groups whose served values changed or may have changed."""
        self.moved: list[str] = []
        """Paths of tensors whose address changed because their layout did."""
        self._handles = handles
        self._native = native
        self.undo = undo
        self._fence = fence
        self._fenced = False

    def before_write(self, *storages: torch.UntypedStorage) -> None:
        """Served memory is about to be written: forward passes that were queued before read the old values.

        Costs one wait for each session. ``storages`` are saved where there is an undo log.
        """
        if not self._fenced:
            self._fenced = True
            self._fence()
        if self.undo is not None:
            for storage in storages:
                self.undo.save(storage)

    @property
    def host_copies(self) -> HostCopies:
        """Takes results to host memory."""
        assert self.undo is not None, "results wait on the host where there is an undo log"
        return self.undo.copies

    def after_writes(self) -> None:
        """Wait until what was written is there, for forward passes on other streams. Raises the errors that
        the device found meanwhile (``RuntimeError``).
        """
        self._fence()

    def refuse_unmakeable(self) -> None:
        """Raises UnsupportedError where captured graphs read a tensor made of weights that nothing can make
        anew where it is.
        """
        if self._graphs:
            refuse_unmakeable(self._late)

    def compare(self, group: StagedGroup) -> Commit:
        """What would make a processed group's served values equal to its result. It has to show what it
        serves.
        """
        return plan_commit(group, self._late)

    def plan(self, group: StagedGroup) -> Commit:
        """The same, to be committed.

        Raises:
            UnsupportedError: captured graphs would not see it.

        """
        if not self._planned:
            self._planned = True
            self.refuse_unmakeable()
        commit = self.compare(group)
        if self._graphs:
            refuse_stale_graphs(commit)
        return commit

    def apply(self, commit: Commit) -> None:
        """Serve the new values of one group."""
        self.moved += [path for _, _, path in commit.moves]
        self.before_write()
        if self.undo is not None:
            self.undo.save_before(commit)
        try:
            commit.apply()
        finally:
            if commit.begun:
                self.groups.add(commit.name)
        for holder, key, value in commit.writes:
            if value is not None:
                self._late.settle(holder, key[1])
        self._native[commit.name] = commit.native
        for _, replaced in commit.exchanges:
            forget_handles(replaced, self._handles)


class CommitStrategy(abc.ABC):
    """Decides when a group's result is committed.

    Args:
        log: applies commits.
        gauge: bytes of staging.
        admission: counts the bytes that results hold.
        release: removes from a group the staging whose identity is not in a set; returns the storages that a
            pool may reuse.

    """

    name: ClassVar[StrategyName]
    """``policy`` in the report."""
    commits_each_group: ClassVar[bool]
    """Whether a group is committed as soon as it is processed. Then loading may overwrite its served memory
    from its first weight on, and its native memory may be released before it is processed."""
    waiting_bytes: ClassVar[int]
    """Bytes of staging, beyond the largest group, that incomplete groups may hold."""
    has_undo_log: ClassVar[bool] = False
    """Whether old values are saved before they are overwritten. Then no other rollback source is needed."""

    def __init__(
        self,
        log: CommitLog,
        gauge: MemoryGauge,
        admission: Admission,
        release: Callable[[StagedGroup, set[int]], list[StagedStorage]],
    ) -> None:
        self._log = log
        self._gauge = gauge
        self._admission = admission
        self._release = release
        self._finishing = False
        self.waiting: list[tuple[StagedGroup, Commit]] = []
        """Results that wait for the commit."""
        self.prepared_bytes = 0
        """Load-format bytes of the groups that wait for the commit: an estimate of the bytes of their
        results.
        """

    @abc.abstractmethod
    def keep(self, group: StagedGroup) -> None:
        """Plan the commit of a processed group, which has to show what it serves; apply it or keep it."""

    def begin_finish(self) -> None:
        """All weights have come, and nothing is served until the session is over."""
        self._finishing = True

    def commit_all(self) -> None:
        """Apply all waiting commits. Writes only to memory that exists already."""
        for _, commit in self.waiting:
            self._log.apply(commit)

    def release_all(self) -> None:
        """Free staging after ``commit_all``."""
        # Not earlier: a result may be a view of another group's memory (``W_UV`` of ``kv_b_proj``'s weight).
        for group, commit in self.waiting:
            group.release(commit.kept_storages(applied=True))

    def forget(self) -> None:
        """Drop results that were not committed."""
        self.waiting = []


class StagedCommit(CommitStrategy):
    """Commits all groups at the end. Takes one kernel-format copy of the model beside the served one."""

    name = "staged"
    commits_each_group = False
    waiting_bytes = OPEN_BUDGET

    def keep(self, group: StagedGroup) -> None:
        commit = self._log.plan(group)
        beside = commit.nbytes_beside(group)
        self._gauge.add(beside)
        for storage in self._release(group, commit.kept_storages(applied=False)):
            storage.drop_references()
        held = sum(storage.nbytes for storage in group.storages if storage.materialised)
        self._admission.results += beside + held
        self.prepared_bytes += group.group.nbytes
        self.waiting.append((group, commit))


class StreamingCommit(CommitStrategy):
    """Commits each group when it is processed. A failure after the first commit needs a rollback source."""

    name: ClassVar[StrategyName] = "streaming"
    commits_each_group = True
    waiting_bytes = OPEN_STREAMING

    def keep(self, group: StagedGroup) -> None:
        commit = self._log.plan(group)
        self._log.apply(commit)
        for storage in self._release(group, commit.kept_storages(applied=True)):
            storage.drop_references()
        group.drop()
        commit.forget()


class UndoCommit(StreamingCommit):
    """Commits each group when it is processed, and saves the old values in host memory just before.

    Takes one layer of device memory, and one kernel-format copy of the model in host memory.
    """

    name = "undo"
    has_undo_log = True


class PreparedCommit(CommitStrategy):
    """Keeps results in host memory until the end, because the engine serves between the calls.

    At the end they are committed group by group with an undo log, then what is processed last is. Takes one
    layer of device memory. In host memory the results make room for the old values as they are committed.
    """

    name = "prepared"
    commits_each_group = False
    waiting_bytes = OPEN_STREAMING
    has_undo_log = True

    def keep(self, group: StagedGroup) -> None:
        commit = self._log.plan(group)
        if self._finishing:
            self._log.apply(commit)
            keep = commit.kept_storages(applied=True)
        else:
            copies = self._log.host_copies
            commit.copies = [(served, copies.copy(new)) for served, new in commit.copies]
            keep = commit.kept_storages(applied=False)
            self.waiting.append((group, commit))
        for storage in self._release(group, keep):
            storage.drop_references()
        group.drop()
        if self._finishing:
            commit.forget()

    def begin_finish(self) -> None:
        """Commit what waits, so that layers which are processed last see the new values of the others."""
        super().begin_finish()
        self._log.host_copies.finish()
        while self.waiting:
            _, commit = self.waiting.pop(0)
            self._log.apply(commit)
            commit.forget()


STRATEGIES: dict[str, type[CommitStrategy]] = {
    cls.name: cls for cls in (StagedCommit, StreamingCommit, UndoCommit, PreparedCommit)
}
