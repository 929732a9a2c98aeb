"""Runs a model's own ``load_weights`` over meta tensors, to learn where a checkpoint would go.

The layers are in load format meanwhile and serve nothing. Afterwards the model is as it was, whatever
happened.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import vllm_api
from ..device.gc_pause import full_gc_paused
from ..device.host_memory import MemoryGauge
from ..interrupts import held
from ..record.model_record import complete_record_of
from ..record.model_view import EnterOptions, ModelView, staged_groups
from ..record.placement import placement
from ..record.untouched_layers import UntouchedLayers
from .arrivals import Loaded
from .copy_plan import CopyPlan
from .ignore_rules import ignore_rule
from .known_checkpoint import KnownCheckpoint
from .loader_run import LIMIT, load_all, run_loader
from .mismatches import Mismatches
from .served_guard import served_tensors
from .slots import check_slots, coverage_of
from .source import TensorInfo
from .tracer import LoadTrace

_AT_A_TIME = 1000
"""Meta tensors that are made at one time: each takes as much memory as all that is learnt of it."""


class DryRun:
    """A loader's run over tensors without values, and what was learnt of it.

        with DryRun(model) as dry_run:
            dry_run.load([infos])
            kept, ignored = dry_run.account()

    Nothing is written: not to staging, and not to what is served. Staging of the parameters that one weight
    goes to is allocated while that weight is loaded. Ctrl-C waits for the end of ``load``.

    Args:
        model: a recorded model, which serves nothing while ``load`` runs.
        expected: what is known of the checkpoint that the engine started with.

    Raises:
        NotRecordedError: the model was built without the plugin.

    """

    def __init__(self, model: nn.Module, expected: KnownCheckpoint | None = None) -> None:
        self.mismatches = Mismatches()
        self._model = model
        self._expected = expected or KnownCheckpoint()
        self._record = record = complete_record_of(model)
        shapes, is_later = self._expected.start_shapes, self._expected.is_later
        self._trace = LoadTrace(self.mismatches, True, shapes, record.world_size > 1, is_later)
        self._groups = staged_groups(record, self._expected.groups, MemoryGauge())
        self._view = ModelView(record, self._groups, EnterOptions(noting=True))
        self._untouched: UntouchedLayers | None = None

    @property
    def loaded(self) -> Loaded:
        """What the loader did with the weights so far."""
        return self._trace.loaded

    @property
    def deferred_groups(self) -> frozenset[str]:
        """Names of groups whose parameters the loader read, or wrote, when other weights had come."""
        return frozenset(self._record.group_with(parameter).name for parameter in self.loaded.read_back)

    def __enter__(self) -> DryRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Forget the load format; the model serves what it served."""
        with held():
            self._view.drop()
            self._groups = []
            self._trace.forget_model()

    def load(self, listings: Iterable[Sequence[TensorInfo]]) -> None:
        """Run the model's loader once for each listing. Weights that it rejects are in ``mismatches``.

        Raises:
            LateWriteError: the loader writes to layers that are not loaded.
            ReloadError: memory ran out.

        """
        record = self._record
        with held(), full_gc_paused():
            record.changes.begin(self)
            try:
                dtype = getattr(record.model_config, "dtype", None)
                with vllm_api.loading_context(record.vllm_config, dtype):
                    self._show()
                    with self._trace:
                        for infos in listings:
                            feed = MetaFeed(infos, self._trace)
                            load_all(functools.partial(run_loader, self._model), feed, self._trace)
            finally:
                self._hide()
                record.changes.end(self)

    def _show(self) -> None:
        if self._untouched is None:
            self._untouched = UntouchedLayers(self._record, [staged.group.name for staged in self._groups])
        if self._view.show():
            for staged in self._groups:
                self._trace.watch(staged.storages)
            self._trace.protect(functools.partial(served_tensors, self._groups, self._untouched))

    def _hide(self) -> None:
        self._view.hide()
        if self._untouched is not None:
            self._untouched.put_back()

    def show_served_if_idle(self) -> bool:
        """Whether the model shows what it serves: not while a loader runs. See ``changes.Change``."""
        return False

    def account(self) -> tuple[dict[str, str], dict[str, str]]:
        """Account for every parameter and weight; see ``check_slots``. Offenders go to ``mismatches``."""
        self._trace.note_new_parameters(self._groups)
        rule = functools.partial(ignore_rule, self._model, self._record, self._expected.start_shapes)
        return check_slots(self._groups, self.loaded, self.mismatches, rule, self._expected.was_written)

    def coverage(self) -> dict[str, str]:
        """Parameter -> ``whole``, ``part`` or ``none``: how much of it the weights write."""
        return coverage_of(self._groups)

    def copy_plan(self) -> CopyPlan | None:
        """How to load the same checkpoint without the model's loader; None if the loader has to run."""
        if not self.loaded.repeatable or any(staged.loader_left_traces() for staged in self._groups):
            return None
        return CopyPlan(placement(self._record), dict(self.loaded.tensor_plans), self.loaded.contested)


class MetaFeed:
    """Meta tensors of a listing, given to a loader one by one.

    Args:
        infos: name, shape and dtype of each weight.
        trace: is told when a weight begins and ends.

    """

    def __init__(self, infos: Sequence[TensorInfo], trace: LoadTrace) -> None:
        self.exhausted = False
        self._trace = trace
        self._weights = _without_values(infos)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        trace = self._trace
        trace.end()
        trace.take_recent()  # nobody processes layers here
        while trace.mismatches.count <= LIMIT:
            found = next(self._weights, None)
            if found is None:
                break
            name, tensor = found
            if trace.loaded.has(name):
                trace.mismatches.duplicate[name] = "sent more than once"
                continue
            trace.begin(name, tensor, late=True)  # nothing tells when the loader is done with it
            return name, tensor
        self.exhausted = True
        raise StopIteration


def _without_values(infos: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    for first in range(0, len(infos), _AT_A_TIME):
        with _disable_current_modes():
            some = [(info.name, info.meta()) for info in infos[first : first + _AT_A_TIME]]
        yield from some
