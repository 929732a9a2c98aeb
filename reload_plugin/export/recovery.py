"""The load format of layers that are served, recovered from their kernel format and proven.

Layers that processing leaves alone are read as they are. Of others a guess is made (``candidates``), then one
by where processing moves each element (``permutation``). A guess counts when processing it again gives, bit
for bit, what is served (``trial``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ..commit.group_commit import Commit
from ..errors import ReloadError
from ..record.model_record import Group, TensorRecord
from ..record.staged_group import StagedGroup
from ..tensors import storage_id
from ..transaction.engine_state import EngineState
from .candidates import candidates_of, places, standing
from .int8_linear import int8_candidates
from .native_twins import NativeTwins
from .permutation import Pair, put_back
from .trial import Trial, difference

logger = logging.getLogger("vllm.reload_plugin")

TRIAL_BYTES = 64 << 20
"""Load-format bytes of the layers that are tried together; a larger layer is tried alone."""

Way = Literal["as it is", "guess", "permutation", "none"]
"""How the load format of a group is recovered."""


@dataclass(frozen=True)
class Recovery:
    """How the load format of one group is recovered."""

    group: Group
    way: Way
    reason: str = ""
    """Why it cannot be, where it cannot."""


@dataclass
class LoadValues:
    """Load-format values of some groups. Views of served memory where the load format stands there."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """Load-format tensor -> values, of its shape and dtype."""
    inverted: set[str] = field(default_factory=set)
    """Those of them that are not served as they are: an inverse of processing gave them."""


class Recoveries:
    """Finds out how the load format of each group can be recovered, and recovers it.

    Args:
        model: recorded, and not being reloaded; nothing writes to its weights meanwhile.
        state: of the model.

    """

    def __init__(self, model: nn.Module, state: EngineState) -> None:
        self._model, self._state, self._record = model, state, state.record
        # After a foreign writer a new handle may lie where a known one was.
        self._twins = NativeTwins(state.handles if state.generation.known else {})
        self._found: dict[str, Recovery] = {}

    def of(self, group: Group) -> Recovery:
        """How the load format of a group is recovered; found out before by ``find``."""
        return self._found[group.name]

    # -- finding out -------------------------------------------------------------------------------

    def find(self, groups: Iterable[Group]) -> Iterator[int]:
        """Find out for some groups; gives the load-format bytes done, batch by batch.

        Takes the memory of ``TRIAL_BYTES``, or of the largest group, three times.
        """
        waiting = [group for group in groups if group.name not in self._found]
        for group in [group for group in waiting if group.needs_no_processing]:
            self._found[group.name] = Recovery(group, "as it is")
            yield group.nbytes
        for batch in self._batches([group for group in waiting if not group.needs_no_processing]):
            self._try_batch(batch)
            yield sum(group.nbytes for group in batch)

    def _batches(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Groups that are tried together. Those that vLLM processes last have to be."""
        last = [group for group in groups if group.late or group.deferred]
        if last:
            yield last
        batch: list[Group] = []
        for group in groups:
            if group.late or group.deferred:
                continue
            if batch and sum(one.nbytes for one in batch) + group.nbytes > TRIAL_BYTES:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def _try_batch(self, batch: list[Group]) -> None:
        values = {name: one for group in batch for name, one in self._guess(group).items()}
        try:
            differing = self._differing(batch, values)
        except ReloadError as error:
            if len(batch) > 1 and not batch[0].late and not batch[0].deferred:
                for group in batch:
                    self._try_batch([group])
                return
            logger.info("Layers could not be processed again: %s", error)
            differing = dict.fromkeys((group.name for group in batch), "processing")
        for group in batch:
            if group.name not in differing:
                self._found[group.name] = Recovery(group, "guess")
            else:
                self._found[group.name] = self._by_permutation(group, differing[group.name])

    def _by_permutation(self, group: Group, what: str) -> Recovery:
        reason = f"no inverse of the processing of {group.name} is known: it changes {what}"
        if group.deferred:
            return Recovery(group, "none", reason)
        try:
            values = self._guess(group) | self._moved_back(group)
            what = self._differing([group], values).get(group.name, "")
        except (ReloadError, RuntimeError, ValueError) as error:
            logger.info("%s could not be inverted: %s: %s", group.name, type(error).__name__, error)
            return Recovery(group, "none", reason)
        if what:
            return Recovery(group, "none", reason)
        return Recovery(group, "permutation")

    def _differing(self, groups: Sequence[Group], values: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Group -> what processing its values again does not give as it is served."""
        differing: dict[str, str] = {}

        def see(staged: StagedGroup, commit: Commit) -> None:
            what = difference(commit, self._twins)
            if what is not None:
                differing[staged.group.name] = what

        Trial(self._model, self._state, frozenset(group.name for group in groups)).run(values, see)
        return differing

    # -- recovering --------------------------------------------------------------------------------

    def values_of(self, groups: Iterable[Group]) -> LoadValues:
        """The load format of groups, as far as it can be recovered. The caller only reads the tensors."""
        recovered = LoadValues()
        for group in groups:
            way = self._found[group.name].way
            if way == "none":
                continue
            values = self._guess(group)
            if way == "permutation":
                values |= self._moved_back(group)
            recovered.values |= values
            for module, name, record in places(group):
                if (value := values.get(record.name)) is not None:
                    served = standing(module, name, record)
                    if served is None or storage_id(served) != storage_id(value):
                        recovered.inverted.add(record.name)
        return recovered

    def _guess(self, group: Group) -> dict[str, torch.Tensor]:
        return int8_candidates(group) | candidates_of(group)

    def _moved_back(self, group: Group) -> dict[str, torch.Tensor]:
        def process(values: Mapping[str, torch.Tensor]) -> list[Pair]:
            pairs: list[Pair] = []

            def see(_: StagedGroup, commit: Commit) -> None:
                pairs.extend((served, new.clone()) for served, new in commit.copies)

            Trial(self._model, self._state, frozenset({group.name})).run(values, see)
            return pairs

        return put_back(_loadable(group), process)


def _loadable(group: Group) -> list[TensorRecord]:
    return [record for record in group.tensors if record.is_parameter]
