"""vLLM's processing of one group, and what has to be around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .. import vllm_api
from ..commit.strategies import CommitLog, CommitStrategy
from ..device.ops import ops_for
from ..device.output_reuse import ReusableOutputs, reusing_served_outputs
from ..options import Wanted
from ..process.native_handles import Handles, NativeWatch, release_native_memory, watching_native
from ..process.processing import process_group, process_tail
from ..ranks.collectives import CollectiveGate, vote_of_call
from ..ranks.meeting import Meetings
from ..record.model_record import ModelRecord
from ..record.staged_group import StagedGroup
from .engine_state import EngineState
from .stage_clock import StageClock
from .vllm_processing import original_process_weights

KEPT_BESIDE = 64 << 20
"""Bytes of a layer up to which its served native memory stays until there is new one. More would not fit the
budget, which also has the beginning of the next layer, and is released before the layer is processed."""


class GroupProcessing:
    """Processes groups one by one.

    Args:
        state: of the model.
        strategy: tells whether served values may be overwritten.
        log: of commits; learns which groups are no longer what was served.
        clock: seconds by stage.

    """

    def __init__(
        self, state: EngineState, strategy: CommitStrategy, log: CommitLog, clock: StageClock
    ) -> None:
        self.spoiled: str | None = None
        """Why the reload cannot be finished any more, once processing failed."""
        self.digest: Wanted = True
        """Whether native handles are hashed when they are made: False is no."""
        self._state, self._record, self._handles = state, state.record, state.handles
        self._meetings: Meetings | None = None
        self._at_once, self._log, self._clock = strategy.commits_each_group, log, clock
        self._watch = ProcessingWatch()

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What vLLM sets while it loads and processes; one for each call of the session."""
        config = self._record.model_config
        with (
            vllm_api.loading_context(self._record.vllm_config, getattr(config, "dtype", None)),
            contextlib.ExitStack() as self._watch.ends_with,
        ):
            yield

    def process(self, group: StagedGroup) -> None:
        """Process one group, whose load format is shown."""
        self.spoiled = f"processing {group.group.name or 'the model'} did not end well"
        released = False
        try:
            with self._clock.timed("process"):
                if self._at_once:
                    self._log.before_write(*group.aliased_memory())
                released = self._release_native_memory(group)
                watched = self._watch.begin(
                    self._record,
                    self._handles,
                    self.digest is not False,
                    reuses_outputs=self._at_once,
                )
                with self._gate(group.group.name):
                    process_group(group, self._record, original_process_weights(), *watched)
        finally:
            if released or group.overwritten or group.written_served_storages():
                self._log.groups.add(group.group.name)
        self.spoiled = None

    @contextlib.contextmanager
    def _gate(self, name: str) -> Iterator[None]:
        """Around processing: ranks enter collectives together, or none does. The vote is the reload's, or in
        a call that only brings weights that of the call.
        """
        vote = self._state.vote or vote_of_call(self._record)
        if vote is None:
            yield
            return
        if self._meetings is None or self._meetings.vote is not vote:
            self._meetings = Meetings(vote)
        gate = CollectiveGate(self._meetings)
        try:
            with gate.around(name):
                yield
        finally:
            self._state.enters_collectives |= gate.entered

    def _release_native_memory(self, group: StagedGroup) -> bool:
        """Release the served native memory of a layer that is too large for the budget twice, where served
        values may be gone before there are new ones.
        """
        large = group.group.nbytes > KEPT_BESIDE and not group.group.needs_no_processing
        if not (large and self._at_once):
            return False
        return release_native_memory(group.made_by_processing(), self._handles)

    def process_tail(self, model: nn.Module) -> None:
        """What vLLM does once all layers are processed."""
        with self._clock.timed("process"), self._gate("the model's own hook"):
            process_tail(model, self._record, original_process_weights())


class ProcessingWatch:
    """What watches processing in one call of the session, begun by the first group: to begin takes longer
    than some groups do.
    """

    def __init__(self) -> None:
        self.ends_with = contextlib.ExitStack()
        self._begun: tuple[NativeWatch, ReusableOutputs] | None = None

    def begin(
        self, record: ModelRecord, handles: Handles, hashes: bool, reuses_outputs: bool
    ) -> tuple[NativeWatch, ReusableOutputs]:
        """The watch over native handles, paused, and what hands out served memory for results."""
        if self._begun is None:
            device = record.target_device
            watch = self.ends_with.enter_context
            self.ends_with.callback(setattr, self, "_begun", None)
            native = watch(watching_native(device, handles, hashes))
            outputs = watch(reusing_served_outputs(reuses_outputs and ops_for(device).reuses_outputs))
            native.paused = True
            self._begun = native, outputs
        return self._begun
