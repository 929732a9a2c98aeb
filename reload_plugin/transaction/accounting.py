"""The account of slots of one session: what is missing, kept and ignored."""

from __future__ import annotations

import functools

from torch import nn

from ..errors import SERVES_OLD, SourceError, weights_error
from ..load.completeness import Completeness
from ..plan.ignore_rules import ignore_rule
from ..plan.known_checkpoint import KnownCheckpoint
from ..plan.slots import check_slots
from ..plan.tracer import LoadTrace
from ..record.model_record import ModelRecord
from ..record.model_view import ModelView
from .group_pipeline import GroupPipeline

Account = tuple[dict[str, str], dict[str, str]]
"""(kept, ignored), both name -> rule, as in the report."""


class Accounting:
    """Accounts for every slot of the groups that are not processed yet; the others were complete.

    Args:
        model: that is reloaded.
        record: of the model.
        view: its groups.
        trace: what the stream brought.
        completeness: brings coverage up to date.
        known: what is known of the checkpoint.
        pipeline: which groups are open.

    """

    def __init__(
        self,
        model: nn.Module,
        record: ModelRecord,
        view: ModelView,
        trace: LoadTrace,
        completeness: Completeness,
        known: KnownCheckpoint,
        pipeline: GroupPipeline,
    ) -> None:
        self._model, self._record, self._view = model, record, view
        self._trace, self._completeness = trace, completeness
        self._known, self._pipeline = known, pipeline

    def check(self, source: str) -> Account:
        """Account for every slot.

        Raises:
            SourceError: nothing came at all.
            WeightsError: lists all offenders.

        """
        loaded, mismatches = self._trace.loaded, self._trace.mismatches
        if not loaded.count and not loaded.written and not mismatches:
            raise SourceError(f"{source} gave no weights. {SERVES_OLD}")
        account = self.account()
        if mismatches:
            raise weights_error(source, SERVES_OLD, **vars(mismatches))
        return account

    def account(self) -> Account:
        """Like ``check``, but leaves the offenders in the mismatches."""
        loaded, mismatches = self._trace.loaded, self._trace.mismatches
        mismatches.missing.clear()
        self._completeness.settle()
        groups = [group for group in self._view.groups if not group.processed]
        if self._completeness.copy_plan is None and self._view.entered:
            self._trace.note_new_parameters(self._pipeline.open)
        rule = functools.partial(ignore_rule, self._model, self._record, self._known.start_shapes)
        return check_slots(groups, loaded, mismatches, rule, self._known.was_written)
