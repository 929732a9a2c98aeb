"""What a running engine serves, as a checkpoint: exact or refused.

Each tensor comes from the first of these that has it: the files that were loaded, if they are still there
(``source``) or a copy that was kept (``kept``); the parameters that hold it as it was loaded (``plan``); an
inverse of what processing did, proven by processing it again (``inverse``); on request what kernels compute
with (``dequantized``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import SERVES_OLD, EngineBrokenError, ExportError, ReloadError, SessionError, export_error
from ..load.progress import byte_bar
from ..plan.checkpoint_plan import PlanUnavailableError
from ..plan.copy_plan import CopyPlan
from ..plan.source import TensorInfo, layer_order
from ..ranks.votes import vote_for
from ..record.placement import placement
from ..report import ExportReport, Tier
from ..transaction.engine_state import PARKED, EngineState, state_of
from ..transaction.known import plan_listing
from ..transaction.live_push import live_push_of
from .answers import reports_in
from .beside import write_beside
from .components import Component, components_of
from .generation_sources import GenerationSources
from .inverse_plan import InvertedTensor, inverted
from .outputs import ExportPlan, OutputGroup, plan_export
from .parts import OfferedTensor, RankOffer, boxes_of, offered
from .planned_files import Box
from .ranked import OUT_OF_REACH, RankedExport
from .tensor_values import ServedTensors, half_a_step
from .writer import write_export

Lossy = Literal["dequantize"]

READ_TOGETHER = 64 << 20
"""Bytes of tensors that are read from files at one time."""


@dataclass
class _Account:
    """What is known of the tensors to be written."""

    tiers: dict[str, Tier] = field(default_factory=dict)
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    offers: dict[str, OfferedTensor] = field(default_factory=dict)
    """What this rank has of each tensor, where several ranks hold the model."""


class ServedExport:
    """Plans an export of one model: which tensors, from where.

    Args:
        model: recorded, and not being reloaded.
        state: of the model.
        sources: of its generation, entered.
        lossy: whether values that quantization lost may be made up.
        ranked: this rank's parts of tensors are made, for an export that ranks write together.

    """

    def __init__(
        self,
        model: nn.Module,
        state: EngineState,
        sources: GenerationSources,
        lossy: Lossy | None,
        ranked: bool = False,
    ) -> None:
        self._model, self._state, self._sources = model, state, sources
        self._lossy = lossy
        self._ranked = ranked
        self._served = ServedTensors(model, state, dequantize=lossy == "dequantize", parts=self._ranked)
        start = state.start.listing(model, state.record)
        self._start = {info.name: info for info in start}
        self._place = {info.name: place for place, info in enumerate(start)}
        self.account = _Account()

    def groups(self, progress: bool | None = None) -> list[OutputGroup]:
        """Everything that can be written, in groups that are made one at a time.

        Raises:
            ExportError: it lists every tensor that cannot be written exactly, and what would help.

        """
        listing = self._sources.listing
        if not listing:
            raise ExportError(
                "The names of the checkpoint that is served are not known: its files are gone, and no reload "
                "told them. Nothing was written. Reload a checkpoint, then export."
            )
        readable = [info for info in listing.values() if self._sources.tier(info.name) is not None]
        groups = [self._group_of_files(some) for some in _together(readable)]
        needed = [name for name in listing if self._sources.tier(name) is None]
        if needed:
            groups += self._groups_of_served(needed, progress)
        if self.account.refused:
            raise export_error("cannot be written as they were loaded", self._help(), self.account.refused)
        return groups

    # -- from files --------------------------------------------------------------------------------

    def _group_of_files(self, infos: Sequence[TensorInfo]) -> OutputGroup:
        names = [info.name for info in infos]
        for info in infos:
            tier = self._sources.tier(info.name)
            assert tier is not None, "only tensors that can be read are grouped"
            self.account.tiers[info.name], self.account.infos[info.name] = tier, info
            if self._ranked:
                whole = Box((0,) * len(info.shape), info.shape)
                self.account.offers[info.name] = offered(info, tier, [whole], None)
        nbytes = sum(info.nbytes for info in infos)
        return OutputGroup(tuple(infos), functools.partial(self._sources.read, names), nbytes)

    # -- from what is served -----------------------------------------------------------------------

    def _groups_of_served(self, names: Sequence[str], progress: bool | None) -> list[OutputGroup]:
        record = self._state.record
        if record.world_size > 1 and not self._ranked:
            raise ExportError(OUT_OF_REACH)
        copy_plan = self._copy_plan(names)
        if copy_plan is None:
            return []
        tensors = [one for one in inverted(names, copy_plan, self._place).values() if self._is_held(one)]
        held = {record.group_with(name).name for one in tensors for name in one.parameters}
        groups = [group for group in record.groups if group.name in held]
        with byte_bar(sum(group.nbytes for group in groups), "checking what is served", progress) as checked:
            for nbytes in self._served.recoveries.find(self._with_companions(groups)):
                checked(nbytes)
        bound = {id(r): r.groups for r in (self._served.recoveries.of(group) for group in groups)}
        components = components_of(tensors, record, bound.values())
        return [self._group_of_served(component) for component in components]

    def _with_companions(self, groups: Sequence[Any]) -> list[Any]:
        """With those that vLLM processes last if one of them is: they are recovered together."""
        if not any(group.late or group.deferred for group in groups):
            return list(groups)
        names = {group.name for group in groups}
        return [g for g in self._state.record.groups if g.name in names or g.late or g.deferred]

    def _is_held(self, one: InvertedTensor) -> bool:
        if one.unused:
            self.account.omitted[one.name] = "the model does not use it, and its file is gone"
        elif one.lost is not None and not one.regions:
            self.account.refused[one.name] = one.lost
        return bool(one.regions)

    def _group_of_served(self, component: Component) -> OutputGroup:
        account = self.account
        dtypes = {one.name: self._dtypes(one) for one in component.tensors}
        outputs = []
        for one, made, tier in self._served.of(component, dtypes):
            if isinstance(made, str):
                account.refused[one.name] = made
                continue
            info = TensorInfo(one.name, tuple(made.shape), made.dtype)
            account.infos[one.name], account.tiers[one.name] = info, tier
            if tier == "dequantized":
                account.errors[one.name] = half_a_step(made)
            if self._ranked:
                account.offers[one.name] = offered(info, tier, boxes_of(one), made)
            outputs.append(info)
        produce = functools.partial(self._produce, component, frozenset(info.name for info in outputs))
        return OutputGroup(tuple(outputs), produce, sum(group.nbytes for group in component.groups))

    def _produce(self, component: Component, names: frozenset[str]) -> dict[str, torch.Tensor]:
        dtypes = {one.name: [self.account.infos[one.name].dtype] for one in component.tensors}
        made = self._served.of(component, dtypes)
        return {one.name: t for one, t, _ in made if one.name in names and isinstance(t, torch.Tensor)}

    def _dtypes(self, one: InvertedTensor) -> list[torch.dtype]:
        """The dtype of the engine's own checkpoint first: a trainer may push another one."""
        known = self._start.get(one.name)
        return [known.dtype] if known is not None and known.shape == one.plan.shape else []

    def _copy_plan(self, names: Sequence[str]) -> CopyPlan | None:
        """A copy plan that has all the names; None where none can be made, and they are refused."""
        listing = self._sources.listing
        known = self._state.plans.copy_plan_on(placement(self._state.record))
        if known is not None and all(_has(known, listing[name]) for name in names):
            return known
        reason = "the model's loader keeps weights back and writes them when others have come"
        try:
            start = self._state.start.known(self._model, self._state.record)
            infos = list(listing.values())
            found = plan_listing(self._model, self._state, infos, "what is served", start).copy_plan
        except (PlanUnavailableError, ReloadError) as error:
            found, reason = None, f"it is not known where the model's loader writes it: {error}"
        if found is None:
            self.account.refused.update(dict.fromkeys(names, reason))
        return found

    def _help(self) -> str:
        text = (
            f"Nothing was written. {SERVES_OLD} Reload with keep_load_format='host' or 'spill', or from "
            "files that stay where they are, and export then"
        )
        quantized = any("quantized" in why or "inverse" in why for why in self.account.refused.values())
        if self._lossy is None and quantized:
            text += "; or pass lossy='dequantize' to write what kernels compute with"
        return text + "."


def _has(copy_plan: CopyPlan, info: TensorInfo) -> bool:
    plan = copy_plan.of.get(info.name)
    return plan is not None and (plan.shape, plan.dtype) == (info.shape, info.dtype)


def _together(infos: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Neighbours in natural order, up to ``READ_TOGETHER`` bytes, or a single one."""
    some: list[TensorInfo] = []
    for info in sorted(infos, key=lambda info: layer_order(info.name)):
        if some and sum(one.nbytes for one in some) + info.nbytes > READ_TOGETHER:
            yield some
            some = []
        some.append(info)
    if some:
        yield some


# -- a call ---------------------------------------------------------------------------------------


def end_push(model: nn.Module) -> None:
    """Commit a push that is over, as the next forward pass would; all ranks have to, since they vote."""
    live = live_push_of(model)
    if live is not None:
        live.before_forward_pass()


@contextlib.contextmanager
def reading_served(model: nn.Module, what: str) -> Iterator[EngineState]:
    """Around a call that reads what a model serves. A push that is over by now is committed first.

    Args:
        model: recorded.
        what: ``export`` or ``verify``, for messages.

    Raises:
        NotRecordedError: the model was built without the plugin.
        EngineBrokenError: it serves nothing.
        SessionError: it sleeps, or an update is open.

    """
    end_push(model)
    state = state_of(model)
    with state.in_a_call():
        if state.broken is not None:
            raise EngineBrokenError(
                f"The engine does not serve: {state.broken}. Reload a complete checkpoint, then {what}."
            )
        if state.parked is not None:
            raise SessionError(f"The engine cannot {what}: {PARKED}")
        if state.asleep:
            raise SessionError(f"The engine sleeps, and its weights are not in memory. Wake it up to {what}.")
        if state.update is not None and not state.update.failed:
            raise SessionError(
                f"A weight update is open: {state.update.describe()}. {SERVES_OLD} Finish it or abort it "
                f"(abort_weight_update), then {what}."
            )
        with torch.inference_mode(False), torch.no_grad():
            yield state


def export_model(
    model: nn.Module,
    directory: str | Path,
    *,
    max_shard_size: int | str | None = "5GB",
    lossy: Lossy | None = None,
    progress: bool | None = None,
) -> ExportReport:
    """Write what a model in this process serves; see ``export_checkpoint``."""
    if lossy not in (None, "dequantize"):
        raise ExportError(f"lossy is {lossy!r}. Nothing was written. Pass None or 'dequantize'.")
    with reading_served(model, "export") as state, GenerationSources(model, state) as sources:
        export = ServedExport(model, state, sources, lossy)
        plan = plan_export(export.groups(progress), max_shard_size)
        beside = _beside(state, sources)
        written = write_export(
            directory, plan, beside=beside, description="what is served", progress=progress
        )
        return _report(directory, plan, export.account, sources.description, written)


def _beside(state: EngineState, sources: GenerationSources) -> Callable[[Path], object]:
    """What puts config and tokenizer of the served generation into a folder."""
    config = state.record.model_config
    origins = [place for place in (sources.folder, getattr(config, "model", None)) if place]
    return functools.partial(write_beside, origins=origins, config=state.start.config)


def export_rank(
    model: nn.Module, directory: str, rank: int, *, max_shard_size: int | str | None, lossy: Lossy | None
) -> ExportReport | None:
    """One rank's part of an export; see ``RankedExport``. Only the first returns a report.

    Raises:
        RanksDisagreeError: another rank failed; nothing was written.
        ExportError: as ``export_checkpoint``.

    """
    if state_of(model).record.world_size == 1:
        return export_model(model, directory, max_shard_size=max_shard_size, lossy=lossy)
    with reading_served(model, "export") as state:
        vote = vote_for(state.record)
        if vote is None:
            raise ExportError(OUT_OF_REACH)
        ranked = RankedExport(vote, rank)
        try:
            with GenerationSources(model, state) as sources:
                export = ServedExport(model, state, sources, lossy, ranked=True)
                groups = export.groups(progress=False)
                account = export.account
                offer = RankOffer(tensors=account.offers, omitted=account.omitted)
                shared = ranked.agree(offer)
                beside = _beside(state, sources)
                plan, written = ranked.write(directory, shared, groups, max_shard_size, beside)
        except BaseException as error:
            ranked.fail(error)
            raise
    if written is None:
        return None
    account.infos, account.tiers, account.omitted = shared.infos, shared.tiers, shared.omitted
    return _report(directory, plan, account, sources.description, written)


def _report(
    directory: str | Path, plan: ExportPlan, account: _Account, source: str, written: Any
) -> ExportReport:
    infos: Mapping[str, TensorInfo] = {name: account.infos[name] for name in plan.file_of}
    return ExportReport(
        source=source,
        directory=str(Path(directory).absolute()),
        tensors=len(infos),
        nbytes=plan.nbytes,
        tiers={name: account.tiers[name] for name in infos},
        dtypes={name: str(info.dtype).removeprefix("torch.") for name, info in infos.items()},
        files=plan.file_of,
        omitted=account.omitted,
        largest_error=account.errors,
        copied=written.copied,
        replaced=written.replaced,
        peak_bytes=plan.peak_bytes,
        seconds=written.seconds,
    )


def export_checkpoint(
    llm_or_model: Any,
    directory: str | Path,
    *,
    max_shard_size: int | str | None = "5GB",
    lossy: Lossy | None = None,
) -> ExportReport:
    """Write what a running engine serves as a checkpoint folder, under the names, shapes and dtypes of its
    checkpoint: exact, or refused. After any sequence of reloads, partial updates and pushes.

    Each tensor's tier is in the report. Memory: one layer, in load format and in kernel format, three times.
    The engine answers nothing meanwhile. An older save in the folder is replaced whole, or not touched.

    Args:
        llm_or_model: a ``vllm.LLM`` (or anything else with ``collective_rpc``), or a model in this process.
        directory: to make; where the workers run.
        max_shard_size: bytes of a file, or with a unit ("5GB"); None for one file.
        lossy: ``dequantize`` writes what kernels compute with where quantization lost what it was made from;
            the report says by how much it may be off.

    Raises:
        ExportError: it lists every tensor that cannot be written exactly, and which option would help; or the
            folder cannot be written. Nothing was written.
        SessionError: an update is open, or the engine sleeps.
        EngineBrokenError: nothing is served.

    """
    if isinstance(llm_or_model, nn.Module):
        return export_model(llm_or_model, directory, max_shard_size=max_shard_size, lossy=lossy)
    answers = llm_or_model.collective_rpc(
        "export_checkpoint",
        kwargs={
            "directory": str(Path(directory).absolute()),
            "max_shard_size": max_shard_size,
            "lossy": lossy,
        },
    )
    return ExportReport.model_validate(reports_in(answers)[0])
