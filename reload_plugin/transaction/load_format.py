"""The load format of the groups that a session reloads: put on the live model, taken off it, forgotten."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..load.completeness import Completeness
from ..plan.served_guard import served_tensors
from ..plan.tracer import LoadTrace
from ..record.changes import Change
from ..record.model_record import ModelRecord
from ..record.model_view import ModelView
from ..record.staged_storage import StagedStorage
from ..record.untouched_layers import UntouchedLayers
from .group_pipeline import GroupPipeline


class LoadFormat:
    """Enters the load format at the first call that needs it, and leaves nothing of it behind.

    Args:
        record: of the model.
        view: shows and hides the groups.
        trace: watches the model's loader; is told of the staging, and of what is served beside it.
        completeness: is told of the staging.
        pipeline: is told that its groups wait for weights.
        touching: called with staging in served memory before somebody may write there.

    """

    def __init__(
        self,
        record: ModelRecord,
        view: ModelView,
        trace: LoadTrace,
        completeness: Completeness,
        pipeline: GroupPipeline,
        touching: Callable[[StagedStorage], None],
    ) -> None:
        self._record, self._view, self._trace = record, view, trace
        self._completeness, self._pipeline, self._touching = completeness, pipeline, touching
        self._untouched: UntouchedLayers | None = None
        """Layers that are not reloaded, as they were; None before the first ``enter``."""

    @property
    def entered(self) -> bool:
        """Whether the groups are in load format, shown or not."""
        return self._untouched is not None

    def enter(self, change: Change, show: bool = True) -> None:
        """Put the groups into load format, if they are not, and show it, or only have it at hand.

        Args:
            change: whose load format it is; told to the record until ``leave``.
            show: whether the live model shows it.

        """
        if self._untouched is not None and not show:
            return
        if self._untouched is None:
            self._record.changes.begin(change)
            groups = self._view.groups
            self._untouched = UntouchedLayers(self._record, [group.group.name for group in groups])
            self._trace.protect(functools.partial(served_tensors, groups, self._untouched), self._touching)
        if self._view.show():
            for group in self._view.groups:
                self._trace.watch(group.storages)
                self._completeness.admit(group)
            self._pipeline.begin()
        if not show:
            self._view.hide()

    def check_untouched(self, source: str) -> None:
        """Raises CrossGroupEffectError when processing changed layers that are not reloaded. They are put
        back.
        """
        if self._untouched is not None:
            self._untouched.check(source)

    def put_back(self) -> None:
        """Undo what loading and processing did to the live model."""
        if self._untouched is not None:
            self._untouched.put_back()
        self._pipeline.put_back_parameters()
        self._view.hide()

    def leave(self, change: Change) -> None:
        """Forget everything that is not served; the live model has to show what it serves."""
        self._view.drop()
        self._pipeline.forget()
        self._trace.forget_model()
        self._untouched = None
        self._record.changes.end(change)
