"""Reloading a model from an iterator or from disk: chooses the policy, keeps the promise.

Weights that can be listed are planned first and refused before anything is touched. Weights that can
only be iterated are staged in full before they are committed, or go to a file first.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import vllm_api
from ..checkpoint import HostCopy, Source, SpillFile, TensorInfo, give_back, in_a_file, open_folder
from ..checkpoint.config import check_config
from ..device.gc_pause import full_gc_paused
from ..device.host_memory import available, settle_heap
from ..errors import CrossGroupEffectError, PartialUpdateError, ReloadError, SourceError, weights_error
from ..interrupts import call_between
from ..load.progress import with_progress
from ..load.stream import WeightStream
from ..options import ReloadOptions, options
from ..plan.checkpoint_plan import Plan
from ..plan.known_checkpoint import KnownCheckpoint
from ..plan.mismatches import Mismatches
from ..plan.tracer import LoadTrace
from ..ranks.votes import ranks_of
from ..record.model_record import ModelRecord
from ..record.recorder import record_constructed
from ..report import ReloadReport
from .chunked_update import abort_weight_update, finish_layerwise, open_layerwise, restore_for_reloading
from .kernel_format import copy_kernel_format
from .partial import SMALL_UPDATE, absorbed, base_of, groups_to_load, laid_over, update_in_place
from .rollback import (
    abandon_open_session,
    after_commit,
    as_reload_errors,
    expected,
    has_rollback_source,
    learn_copy_plan,
    note_report,
    noting_failures,
    plan_for,
    replace_rollback_source,
    rollback_on_failure,
    session_for,
)
from .session import SERVES_OLD, Policy, ReloadSession

__all__ = [
    "abandon_open_session",
    "abort_weight_update",
    "finish_layerwise",
    "open_layerwise",
    "record_for_reloading",
    "reload_weights",
    "restore_for_reloading",
]

logger = logging.getLogger("vllm.reload_plugin")

Weights = Iterable[tuple[str, torch.Tensor]]
Kept = HostCopy | SpillFile


def reload_weights(
    model: nn.Module,
    weights_iterator: Weights | None = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
    **how: Any,
) -> ReloadReport:
    """Make ``model`` the one a cold start on the new weights would give, in place.

    Args:
        model: a model of a running engine, recorded by the plugin.
        weights_iterator: (checkpoint name, tensor) pairs. A tensor may be reused by the caller as
            soon as the next pair is asked for.
        weights_path: folder or file to read instead, in any format that ``open_source`` reads; with
            neither, the engine's own model path. It is not remembered.
        is_checkpoint_format: False for tensors that are in kernel format already: exact names,
            shapes and dtypes of the served parameters and buffers.
        **how: options, all of them optional:

            * ``policy``: ``auto``, ``host``, ``spill``, ``reread`` or ``streaming``: where the way back is
              and what it costs; see ``options.ReloadPolicy``.
            * ``partial``: only the weights that come change; see ``partial``.
            * ``manifest``: checkpoint name -> (shape, dtype) of everything the iterator will bring: it is
              checked before anything is touched, and the iterator is held to it.
            * ``check_finite``: refuse weights with NaN or infinite values.
            * ``keep_load_format``: ``host`` or ``spill``: keep a copy of the weights as they came, so that
              partial updates find the other weights of a layer, and failed reloads the old generation.
            * ``spill_dir``: folder for temporary files.
            * ``weight_version``: a name for these weights, for ``status``.
            * ``require_marker``: name of a file that the trainer writes last; a folder without it is refused.
            * ``digest``: hash what the kernels read. True, the default here: now, for the report; ``later``,
              the default of vLLM's runners, which return no report: when ``status`` is asked for it; False:
              not, nor what native handles are made of, so that the status cannot tell it either.
            * ``progress``: whether a bar on stderr counts the bytes of a reload from disk. None: on rank 0
              where stderr is a terminal.
            * ``whole_model``: load everything before anything is processed; for models whose loader comes
              back to layers it has finished.

    Returns:
        What was loaded, kept and ignored, and what it cost.

    Raises:
        ReloadError: the reload failed and the engine serves what it served before.
        EngineBrokenError: it failed while layers were committed one by one and the old weights
            could not be brought back; the engine refuses to serve until a reload succeeds.

    """
    started = time.perf_counter()
    with noting_failures(model) as record, full_gc_paused(), as_reload_errors(record):
        chosen = options(**how)
        _require_one_rank(record, chosen.policy)
        if weights_iterator is not None and weights_path is not None:
            raise SourceError(f"Give weights_iterator or weights_path, not both. {SERVES_OLD}")
        if weights_iterator is not None:
            if not is_checkpoint_format:
                report = copy_kernel_format(model, weights_iterator, "the iterator", chosen)
            else:
                report = _from_iterator(model, record, weights_iterator, chosen)
        else:
            path = record.model_config.model if weights_path is None else str(weights_path)
            source = _opened(path, model, record, chosen.require_marker)
            if not is_checkpoint_format:
                with contextlib.closing(with_progress(source.read(), source, chosen.progress)) as weights:
                    report = copy_kernel_format(model, weights, path, chosen)
            else:
                report = _from_source(model, record, source, chosen)
        seconds = report.seconds | {"total": time.perf_counter() - started}
        report = note_report(record, report.model_copy(update={"seconds": seconds}))
    settle_heap()
    return report


def record_for_reloading(model: nn.Module, vllm_config: Any = None) -> None:
    """Record a model that was not built by vLLM's loaders.

    Call it right after the model is constructed, before its weights are loaded; vLLM's
    ``process_weights_after_loading(model, ...)`` then completes the record.
    """
    config = vllm_config if vllm_config is not None else vllm_api.current_vllm_config()
    record_constructed(model, None, config)


def _opened(path: str, model: nn.Module, record: ModelRecord, marker: str | None) -> Source:
    try:
        check_config(path, record.model_config, record.start_config)
        return open_folder(path, record.vllm_config, record.model_config, model, marker)
    except SourceError as error:
        raise SourceError(f"{error} {SERVES_OLD}") from error.__cause__


# -- from an iterator -----------------------------------------------------------------------------


def _from_iterator(
    model: nn.Module, record: ModelRecord, weights: Weights, chosen: ReloadOptions
) -> ReloadReport:
    if chosen.policy == "reread":
        raise ReloadError(
            "policy='reread' needs weights in files, and an iterator can be read once only. "
            f"{SERVES_OLD} Use 'spill', which writes them to a file first, or 'host'."
        )
    plan = _plan_of_manifest(model, record, chosen)
    if plan is not None and not chosen.partial:
        weights = _held_to(weights, plan)
    if chosen.partial:
        top = _collected(weights, chosen, None if chosen.policy == "spill" else SMALL_UPDATE)
        return _partially(model, record, top, chosen)
    if _spills(model, record, chosen):
        return _from_spill_file(model, record, weights, chosen)
    started = time.perf_counter()
    learn_copy_plan(model, record)
    planned = time.perf_counter() - started
    policy: Policy = "streaming" if chosen.policy == "streaming" else "staged"
    known = expected(model, record, plan, chosen.whole_model)
    with _keeping(chosen, "the iterator") as kept:
        session = _session(model, record, "the iterator", policy, known, chosen, kept)
        with rollback_on_failure(model, record, session, undo=policy == "staged"), session:
            session.load_last(weights)
            report = session.finish()
    found = {name: rule for name, rule in record.kept.items() if session.completeness.took_by_name(name)}
    found = plan.kept if plan is not None else found
    report = _completed(report, found | report.kept, _way_back(policy), planned)
    after_commit(record, kept, session, plan)
    record.kept = report.kept
    return report


def _spills(model: nn.Module, record: ModelRecord, chosen: ReloadOptions) -> bool:
    """Whether weights from an iterator go to a file first."""
    if chosen.policy == "auto" and not chosen.whole_model and ranks_of(record) == 1:
        needed = sum(group.nbytes for group in record.groups)
        crowded = available(record.target_device) < needed + needed // 4
        return crowded and has_rollback_source(model, record)
    if chosen.policy != "spill":
        return False
    _require_rollback_source(model, record, "spill")
    return True


def _from_spill_file(
    model: nn.Module, record: ModelRecord, weights: Weights, chosen: ReloadOptions
) -> ReloadReport:
    """The weights go to a file, which is then reloaded like any other; it stays as the way back."""
    spilled = _collected(weights, chosen, None)
    try:
        asked = chosen.model_copy(update={"policy": "reread", "keep_load_format": None})
        report = _from_source(model, record, spilled, asked)
    except BaseException:
        spilled.close()
        raise
    return report.model_copy(update={"old_generation": "spill", "spilled_bytes": spilled.nbytes})


def _collected(weights: Weights, chosen: ReloadOptions, in_memory: int | None) -> Kept:
    """All weights of an iterator, in memory up to ``in_memory`` bytes, else in a file.

    Raises:
        WeightsError: some are no tensors with values, or come twice, or are not finite.

    """
    mismatches = Mismatches()
    trace = LoadTrace(mismatches)
    feed = WeightStream(weights, trace, lambda: None)
    kept: Kept = (
        SpillFile(chosen.spill_dir, "the iterator") if in_memory is None else HostCopy("the iterator")
    )
    try:
        for name, tensor in _items(feed):
            trace.note_arrival(name, tensor)
            if chosen.check_finite and (reason := _not_finite(tensor)) is not None:
                mismatches.nonfinite[name] = reason
            kept.add(name, tensor)
            if isinstance(kept, HostCopy) and trace.loaded.nbytes > (in_memory or 0):
                in_file = in_a_file(kept, chosen.spill_dir)
                kept.close()
                kept = in_file
        if mismatches:
            raise weights_error("the iterator", SERVES_OLD, **vars(mismatches))
        if not trace.loaded.shapes:
            raise SourceError(f"the iterator gave no weights. {SERVES_OLD}")
    except BaseException:
        kept.close()
        raise
    return kept


def _items(feed: WeightStream) -> Iterator[tuple[str, torch.Tensor]]:
    with contextlib.suppress(StopIteration):
        while True:
            name, tensor = feed.fetch()
            if tensor is not None:
                yield name, tensor


def _plan_of_manifest(model: nn.Module, record: ModelRecord, chosen: ReloadOptions) -> Plan | None:
    """The manifest, checked like the headers of a folder, before a weight is asked for."""
    if chosen.manifest is None:
        return None
    infos = [TensorInfo(name, tuple(shape), dtype) for name, (shape, dtype) in chosen.manifest.items()]
    if chosen.partial:
        return None  # checked with the weights, before anything is touched
    plan = plan_for(model, record, _Manifest(infos))
    if plan is not None:
        plan.raise_problems("the manifest")
    return plan


class _Manifest:
    """What an iterator says it will bring."""

    description = "the manifest"

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        self._infos = infos

    def infos(self) -> Sequence[TensorInfo]:
        return self._infos

    def read(self, order: Any = None, pool: Any = None, destinations: Any = None) -> Any:
        raise NotImplementedError

    def unchanged(self) -> bool:
        return False


def _held_to(weights: Weights, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, refused as soon as one is not what the manifest says."""
    for item in weights:
        name, tensor = item if isinstance(item, (tuple, list)) and len(item) == 2 else (None, None)
        if isinstance(name, str) and isinstance(tensor, torch.Tensor):
            info = plan.infos.get(name)
            here = f"{list(tensor.shape)} {tensor.dtype}"
            if info is None:
                raise SourceError(f"{name} ({here}) is not in the manifest. {SERVES_OLD}")
            if info.shape != tuple(tensor.shape) or info.dtype != tensor.dtype:
                says = f"{list(info.shape)} {info.dtype}"
                raise SourceError(f"{name} is {here} and the manifest says {says}. {SERVES_OLD}")
        yield item


# -- from a source --------------------------------------------------------------------------------


def _from_source(
    model: nn.Module,
    record: ModelRecord,
    source: Source,
    chosen: ReloadOptions,
    changed: frozenset[str] | None = None,
    sent: Collection[str] = (),
) -> ReloadReport:
    """``changed``: the groups whose weights are others than those that are served, None for any; ``sent``:
    the names of those weights.
    """
    if chosen.partial:
        return _partially(model, record, source, chosen)
    started = time.perf_counter()
    plan = plan_for(model, record, source)
    planned = time.perf_counter() - started
    if plan is not None:
        plan.raise_problems(source.description)
    policy, rollback_source = _policy_for(model, record, plan, chosen)
    known = expected(model, record, plan, chosen.whole_model)
    order = plan.order if plan is not None else None
    if plan is not None and changed is not None and not chosen.whole_model:
        groups = groups_to_load(record, plan, changed)
        known = known.only(groups)
        wanted = frozenset(sent).union(*known.names_of_group.values())
        order = order if groups is None else tuple(name for name in plan.order if name in wanted)
    with _keeping(chosen, source.description) as kept:
        ordered = getattr(source, "in_order", True)
        session = _session(model, record, source.description, policy, known, chosen, kept, ordered)
        with (
            rollback_on_failure(model, record, session, undo=rollback_source != "none"),
            session,
            session.undisturbed(),
        ):
            reading = with_progress(
                source.read(order, record.pool, session.destinations), source, chosen.progress, order
            )
            with contextlib.closing(reading) as weights:
                session.load_last(weights, call_between)
            report = session.finish()
    found = plan.kept | report.kept if plan is not None else report.kept
    report = _completed(report, found, rollback_source, planned)
    after_commit(record, kept or source, session, plan)
    record.kept = report.kept
    return report


def _completed(
    report: ReloadReport, kept: dict[str, str], rollback_source: str, planned: float
) -> ReloadReport:
    """A session's report with what only its caller knows; ``planned`` are the seconds of the plan."""
    seconds = report.seconds | {"plan": planned}
    return report.model_copy(update={"kept": kept, "old_generation": rollback_source, "seconds": seconds})


def _policy_for(
    model: nn.Module, record: ModelRecord, plan: Plan | None, chosen: ReloadOptions
) -> tuple[Policy, str]:
    """How to commit, and where the way back is."""
    if chosen.policy == "streaming":
        return "streaming", "none"
    if chosen.policy in ("reread", "spill"):
        _require_rollback_source(model, record, chosen.policy)
        return "streaming", "reread"
    alone = ranks_of(record) == 1 and not chosen.whole_model
    if chosen.policy == "auto" and plan is not None and alone and has_rollback_source(model, record):
        return "streaming", "reread"
    return "staged", "host"


def _way_back(policy: Policy) -> str:
    return "host" if policy == "staged" else "none"


def _require_rollback_source(model: nn.Module, record: ModelRecord, policy: str) -> None:
    if not has_rollback_source(model, record):
        raise ReloadError(
            f"policy={policy!r} needs the served weights in a place where they can be read again, and there "
            f"is none. {SERVES_OLD} Reload under policy='host', once with keep_load_format='spill' or from a "
            "folder that stays where it is."
        )


def _require_one_rank(record: ModelRecord, policy: str) -> None:
    if policy not in ("auto", "host") and ranks_of(record) > 1:
        raise ReloadError(
            f"policy={policy!r} commits layer by layer, and {ranks_of(record)} ranks can commit together "
            f"under 'host' only. {SERVES_OLD}"
        )


# -- both -----------------------------------------------------------------------------------------


def _partially(model: nn.Module, record: ModelRecord, top: Source, chosen: ReloadOptions) -> ReloadReport:
    """Change the weights that ``top`` holds and no others. All or nothing."""
    sent = {info.name for info in top.infos() or ()}
    try:
        base = base_of(model, record)
        if base is None and record.broken is not None:
            raise PartialUpdateError(
                f"The engine does not serve ({record.broken}), so a part of the weights has nothing "
                "to be added to. Reload a complete checkpoint first."
            )
        if base is None:
            report = update_in_place(model, record, top, chosen)
            replace_rollback_source(record, None)
            give_back(top)
            return report
        whole, changed = laid_over(model, record, base, top)
        asked = chosen.model_copy(update={"partial": False, "keep_load_format": None})
        try:
            report = _from_source(
                model, record, whole, asked, None if record.has_cross_group_effects else changed, sent
            )
        except ReloadError as error:
            if not isinstance(error, CrossGroupEffectError) and not isinstance(
                error.__cause__, CrossGroupEffectError
            ):
                raise  # the cause, where layers were committed already and nobody was to bring them back
            logger.info("The partial update is done once more, with all layers: %s", error)
            record.has_cross_group_effects = True
            report = _from_source(model, record, whole, asked)
    except BaseException:
        give_back(top)
        raise
    with contextlib.suppress(SourceError):  # else both stay, one over the other
        record.rollback_source = absorbed(whole, chosen.spill_dir)
    return report.model_copy(update={"partial": True, "companions": report.tensors - len(sent)})


def _session(
    model: nn.Module,
    record: ModelRecord,
    description: str,
    policy: Policy,
    known: KnownCheckpoint,
    chosen: ReloadOptions,
    kept: Kept | None,
    in_order: bool = True,
) -> ReloadSession:
    def inspect(name: str, tensor: torch.Tensor) -> str | None:
        if kept is not None:
            kept.add(name, tensor)
        return _not_finite(tensor) if chosen.check_finite else None

    session = session_for(
        model,
        record,
        description,
        policy,
        known,
        whole_model=chosen.whole_model,
        inspect=inspect if kept is not None or chosen.check_finite else None,
        spill_dir=chosen.spill_dir,
        in_order=in_order,
    )
    session.weight_version, session.digest = chosen.weight_version, chosen.digest
    return session


@contextlib.contextmanager
def _keeping(chosen: ReloadOptions, description: str) -> Iterator[Kept | None]:
    """A place for a copy of the weights as they come, given back if the reload fails."""
    if chosen.keep_load_format is None:
        yield None
        return
    in_file = chosen.keep_load_format == "spill"
    kept: Kept = SpillFile(chosen.spill_dir, description) if in_file else HostCopy(description)
    try:
        yield kept
    except BaseException:
        kept.close()
        raise


def _not_finite(tensor: torch.Tensor) -> str | None:
    """How many values of a weight are NaN or infinite, in words; None when all are finite."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return None
    values = tensor.detach()
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)
    wrong = values.numel() - int(torch.isfinite(values).sum())
    return f"{wrong} of {values.numel()} values are NaN or infinite" if wrong else None
