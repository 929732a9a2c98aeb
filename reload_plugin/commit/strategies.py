"""When the new values of a group become the served ones.

A strategy is chosen once for a reload, by its name in ``STRATEGIES``; nobody else compares names.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, Literal

import torch

from ..device.host_memory import MemoryGauge
from ..load.admission import Admission
from ..load.overflow import OPEN_BUDGET, OPEN_STREAMING
from ..process.native_handles import Handles, forget_handles
from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage
from .compare import plan_commit
from .group_commit import Commit

StrategyName = Literal["staged", "streaming"]


class CommitLog:
    """What was committed so far, and the one place where a commit is applied.

    Args:
        handles: native handles that are known, of the model.
        native: group name -> memory that the group's native handles point into, of the model.

    """

    def __init__(self, handles: Handles, native: dict[str, list[torch.Tensor]]) -> None:
        self.groups: set[str] = set()
        """Names of groups whose served values were touched, or may have been."""
        self.moved: list[str] = []
        """Paths of tensors whose layout changed, so that their address could not be kept."""
        self._handles = handles
        self._native = native

    def apply(self, commit: Commit) -> None:
        """Serve the new values of one group."""
        self.moved += [path for _, _, path in commit.moves]
        try:
            commit.apply()
        finally:
            if commit.begun:
                self.groups.add(commit.name)
        self._native[commit.name] = commit.native
        for _, replaced in commit.exchanges:
            forget_handles(replaced, self._handles)


class CommitStrategy(abc.ABC):
    """Decides what becomes of a group's result.

    Args:
        log: applies commits.
        gauge: bytes of staging.
        admission: bytes that results hold.
        release: takes from a group the staging whose identity is not among those given; returns what a pool
            may have again.

    """

    name: ClassVar[StrategyName]
    """As in the report."""
    commits_each_group: ClassVar[bool]
    """Whether a group is served when it is done, before the others are. Its served memory may be overwritten
    from its first weight on then, and its native memory released before it is processed."""
    waiting_bytes: ClassVar[int]
    """Bytes of staging, beyond the largest group, that groups may hold while they wait for the rest of
    theirs."""

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
        self.waiting: list[tuple[StagedGroup, Commit]] = []
        """Results that wait for the commit."""
        self.prepared_bytes = 0
        """Load-format bytes of the groups that wait for the commit, about what their new values take."""

    @abc.abstractmethod
    def keep(self, group: StagedGroup) -> None:
        """Take the result of a group that shows what it serves."""

    def commit_all(self) -> None:
        """Serve all results that wait. Touches only memory that is there already."""
        for _, commit in self.waiting:
            self._log.apply(commit)

    def release_all(self) -> None:
        """After the commit: give staging back. Only when all are committed, because results may be views of
        one another's memory (``W_UV`` of ``kv_b_proj``'s weight).
        """
        for group, commit in self.waiting:
            group.release(commit.kept_storages(applied=True))

    def forget(self) -> None:
        """Let go of results that were not committed."""
        self.waiting = []


class StagedCommit(CommitStrategy):
    """Every result waits until all are there: one kernel-format copy of the model beside the served one."""

    name = "staged"
    commits_each_group = False
    waiting_bytes = OPEN_BUDGET

    def keep(self, group: StagedGroup) -> None:
        commit = plan_commit(group)
        beside = commit.nbytes_beside(group)
        self._gauge.add(beside)
        for storage in self._release(group, commit.kept_storages(applied=False)):
            storage.drop_references()
        held = sum(storage.nbytes for storage in group.storages if storage.materialised)
        self._admission.results += beside + held
        self.prepared_bytes += group.group.nbytes
        self.waiting.append((group, commit))


class StreamingCommit(CommitStrategy):
    """Every group is committed when it is done. A failure afterwards needs a rollback source."""

    name = "streaming"
    commits_each_group = True
    waiting_bytes = OPEN_STREAMING

    def keep(self, group: StagedGroup) -> None:
        commit = plan_commit(group)
        self._log.apply(commit)
        for storage in self._release(group, commit.kept_storages(applied=True)):
            storage.drop_references()
        group.drop()
        commit.forget()


STRATEGIES: dict[str, type[CommitStrategy]] = {cls.name: cls for cls in (StagedCommit, StreamingCommit)}
