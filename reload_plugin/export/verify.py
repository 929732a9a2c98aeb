"""Does an engine serve a checkpoint? In the checkpoint's own coordinates, without a second copy of the model.

Every layer is loaded and processed beside what is served and compared with it, one at a time. Layers that
differ are put back into load format (``tensor_values``), which tells the tensors and elements.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import HostCopy, Overlay, Source, open_folder
from ..errors import ReloadError
from ..plan.checkpoint_plan import Plan
from ..record.model_record import Group
from ..report import TensorDifference, VerifyReport
from ..transaction.engine_state import EngineState
from ..transaction.known import plan_for
from .answers import reports_in
from .comparison import Compared, Comparison
from .components import components_of
from .footprints import differing_tensors
from .inverse_plan import InvertedTensor, inverted
from .served import reading_served
from .tensor_values import ServedTensors
from .trial import as_bits

_NO_INVERSE = "its layer is served with other values, and which of its tensors differ cannot be told"


class Verification:
    """One comparison of what a model serves with a source.

    Args:
        model: recorded, and not being reloaded.
        state: of the model.
        source: that it may serve.

    """

    def __init__(self, model: nn.Module, state: EngineState, source: Source) -> None:
        self._model, self._state, self._source = model, state, source
        self._groups = {group.name: group for group in state.record.groups}
        self._last = [group for group in state.record.groups if group.late or group.deferred]
        start = state.start.shapes(model, state.record)
        self._place = {name: index for index, name in enumerate(start)}
        self.different: dict[str, TensorDifference] = {}
        self.not_verifiable: dict[str, str] = {}
        self.ignored: dict[str, str] = {}
        self.layers: dict[str, str] = {}
        self._served_values: dict[str, torch.Tensor] = {}
        """Of tensors that differ, while others of their layers cannot be compared."""
        self.names: set[str] = set()
        """Every tensor of the source."""

    def run(self, progress: bool | None = None) -> None:
        """Compare, and fill in the findings.

        Raises:
            WeightsError: the source is not for this model; it lists all offenders.
            SourceError: it cannot be read.

        """
        plan = plan_for(self._model, self._state, self._source)
        if plan is not None:
            plan.raise_mismatches(self._source.description)
        comparison = Comparison(self._model, self._state, plan)
        compared = comparison.run(self._source, progress)
        self.ignored = comparison.ignored | self._overwritten(plan)
        names_of = self._joined(comparison.names_of_groups())
        infos = self._source.infos()
        self.names = {i.name for i in infos} if infos else set().union(*names_of.values())
        differing = self._joined_differences(compared)
        for name, what in differing.items():
            if not names_of.get(name):
                self.layers[name or "the model"] = what
        suspects = {name: sorted(names_of[name]) for name in differing if names_of.get(name)}
        if suspects:
            self._find(suspects, differing, plan)

    def _joined(self, names_of: Mapping[str, set[str]]) -> dict[str, set[str]]:
        """Group -> the tensors that may make it differ. Those that vLLM processes last make values of one
        another (MLA's of ``kv_b_proj``), so they count as one, under the name of the first.
        """
        joined: dict[str, set[str]] = {}
        for name, names in names_of.items():
            joined.setdefault(self._lead(name), set()).update(names - self.ignored.keys())
        return joined

    def _joined_differences(self, compared: Compared) -> dict[str, str]:
        return {self._lead(name): what for name, what in compared.items() if what is not None}

    def _lead(self, name: str) -> str:
        last = self._last
        return last[0].name if last and any(group.name == name for group in last) else name

    def _overwritten(self, plan: Plan | None) -> dict[str, str]:
        """Tensors of which a start on the source would leave nothing, because others go to the same place."""
        if plan is None or plan.copy_plan is None:
            return {}
        contested = set().union(*map(set, plan.copy_plan.contested.values()))
        found = inverted(sorted(contested), plan.copy_plan, self._place).values()
        return {one.name: one.lost for one in found if one.lost is not None and one.regions}

    def _find(
        self, suspects: Mapping[str, list[str]], differing: Mapping[str, str], plan: Plan | None
    ) -> None:
        """Find the tensors and elements that make groups differ."""
        names = sorted({name for some in suspects.values() for name in some})
        unknown = dict.fromkeys(names, _NO_INVERSE)
        if plan is not None and plan.copy_plan is not None:
            unknown = self._compare_tensors(names, plan)
            if unknown and self._served_values:
                self._clear(suspects, unknown, plan)
        for group, some in suspects.items():
            self._blame(group, some, unknown, differing[group], plan)
        for name, reason in unknown.items():
            if name not in self.different:
                self.not_verifiable[name] = reason

    def _clear(self, suspects: Mapping[str, list[str]], unknown: dict[str, str], plan: Plan) -> None:
        """Take tensors that cannot be compared off the list where, with those that differ replaced by what is
        served of them, their group is served as it would be.
        """
        served = HostCopy("what is served")
        for name, tensor in self._served_values.items():
            served.add(name, tensor)
        self._served_values = {}
        compared = Comparison(self._model, self._state, plan).run(Overlay(self._source, served))
        still = self._joined_differences(compared)
        for group, names in suspects.items():
            if group not in still:
                for name in names:
                    unknown.pop(name, None)

    def _compare_tensors(self, names: Iterable[str], plan: Plan) -> dict[str, str]:
        """Compare tensors with what is served of them; returns those that cannot be -> why."""
        assert plan.copy_plan is not None
        tensors = [one for one in inverted(names, plan.copy_plan, self._place).values() if not one.unused]
        served = ServedTensors(self._model, self._state)
        record = self._state.record
        held = {record.group_with(parameter).name for one in tensors for parameter in one.parameters}
        groups = [self._groups[name] for name in held]
        if any(group.late or group.deferred for group in groups):
            groups += [group for group in self._last if group.name not in held]
        for _ in served.recoveries.find(groups):
            pass
        bound = {id(found): found.groups for found in (served.recoveries.of(group) for group in groups)}
        unknown = {one.name: one.lost for one in tensors if one.lost is not None and not one.regions}
        for component in components_of([one for one in tensors if one.regions], record, bound.values()):
            dtypes = {one.name: _served_dtypes(one) for one in component.tensors}
            theirs = self._read([one.name for one in component.tensors])
            for one, ours, _ in served.of(component, dtypes):
                if isinstance(ours, str):
                    unknown[one.name] = _NO_INVERSE if one.lost is None else one.lost
                elif (found := _difference(theirs[one.name], ours)) is not None:
                    self.different[one.name] = found
                    self._served_values[one.name] = ours.to(theirs[one.name].dtype)
        return unknown

    def _blame(
        self, group: str, names: list[str], unknown: dict[str, str], what: str, plan: Plan | None
    ) -> None:
        """Find out which of the tensors of a group that cannot be compared make it differ."""
        open_ = [name for name in names if name in unknown]
        if any(name in self.different for name in names) and not open_:
            return
        if not open_:
            self.layers[group or "the model"] = what
            return
        if len(open_) == 1 and not any(name in self.different for name in names):
            self.different[open_[0]] = TensorDifference(elements=None)  # nothing else is left
            return
        guilty = self._by_footprint(group, names, open_, plan)
        if guilty is not None:
            for name in open_:
                del unknown[name]
            self.different.update((name, TensorDifference(elements=None)) for name in guilty)

    def _by_footprint(
        self, group: str, names: list[str], suspects: list[str], plan: Plan | None
    ) -> set[str] | None:
        copy_plan = plan.copy_plan if plan is not None else None
        if copy_plan is None or any(copy_plan.of[name].copies is None for name in names):
            return None
        with contextlib.suppress(ReloadError, RuntimeError):
            tensors = self._read(names)
            lead = self._groups[group]
            together: list[Group] = self._last if lead in self._last else [lead]
            return differing_tensors(self._model, self._state, together, tensors, suspects, copy_plan)
        return None

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        with contextlib.closing(self._source.read(names)) as weights:
            return {name: tensor for name, tensor in weights if name in names}


def _served_dtypes(one: InvertedTensor) -> list[torch.dtype]:
    return [one.regions[0].target_dtype] if len({r.target_dtype for r in one.regions}) == 1 else []


def _difference(theirs: torch.Tensor, ours: torch.Tensor) -> TensorDifference | None:
    """How a tensor of the source differs from what is served, in the dtype that serves it."""
    differs = as_bits(theirs.to(ours.device, ours.dtype)) != as_bits(ours)
    count = int(differs.sum())
    if not count:
        return None
    first = differs.nonzero()[0].tolist() if differs.dim() else []
    return TensorDifference(elements=count, first=tuple(first))


def verify_model(
    model: nn.Module, source: str | Path | Source, *, rank: int = 0, progress: bool | None = None
) -> VerifyReport:
    """Whether a model in this process serves a source; see ``verify``."""
    started = time.perf_counter()
    with reading_served(model, "verify") as state:
        record = state.record
        opened = (
            open_folder(str(source), record.vllm_config, record.model_config, model)
            if isinstance(source, (str, Path))
            else source
        )
        found = Verification(model, state, opened)
        found.run(progress)
        bad = found.different.keys() | found.not_verifiable.keys()
        return VerifyReport(
            source=opened.description,
            serves=not bad and not found.layers,
            tensors=len(found.names),
            equal=len(found.names - bad - found.ignored.keys()),
            different=found.different,
            not_verifiable=found.not_verifiable,
            ignored=found.ignored,
            layers=found.layers,
            version=state.generation.version,
            seconds=time.perf_counter() - started,
            rank=rank,
        )


def verify(llm_or_model: Any, source: str | Path | Source) -> VerifyReport:
    """Does this engine serve that checkpoint? Nothing is changed, whatever comes out.

    Takes the memory of one layer, in load format and in kernel format, three times; reads the source once,
    and tensors of layers that differ again. The engine answers nothing meanwhile.

    Args:
        llm_or_model: a ``vllm.LLM`` (or anything else with ``collective_rpc``), or a model in this process.
        source: a folder that the workers can read; for a model in this process also an open source.

    Returns:
        The report of the rank that found most; a tensor may differ on one rank alone.

    Raises:
        WeightsError: the checkpoint is not for this model; it lists all offenders.
        SourceError: it cannot be read.
        SessionError: an update is open, or the engine sleeps.
        EngineBrokenError: nothing is served.

    """
    if isinstance(llm_or_model, nn.Module):
        return verify_model(llm_or_model, source)
    if not isinstance(source, (str, Path)):
        raise ReloadError(
            "An open source cannot be sent to the workers of an engine. Give the folder of the checkpoint."
        )
    place = Path(source)
    path = str(place.absolute()) if place.exists() else str(source)
    answers = llm_or_model.collective_rpc("verify_checkpoint", kwargs={"path": path})
    return worst([VerifyReport.model_validate(answer) for answer in reports_in(answers)])


def worst(reports: list[VerifyReport]) -> VerifyReport:
    """The report that found most."""
    return max(reports, key=lambda r: (not r.serves, len(r.different), len(r.not_verifiable), len(r.layers)))
