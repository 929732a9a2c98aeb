"""Reloading a model in one call, from an iterator or from disk.

Weights that can be listed are planned first and refused before anything is touched. Weights that can
only be iterated are staged in full before they are committed, or go to a file first.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import vllm_api
from ..checkpoint import HostCopy, Source, SpillFile, close_source, open_folder
from ..checkpoint.config import check_config
from ..device.gc_pause import full_gc_paused
from ..device.host_memory import settle_heap
from ..errors import SERVES_OLD, CrossGroupEffectError, PartialUpdateError, ReloadError, SourceError
from ..interrupts import call_between
from ..load.progress import with_progress
from ..options import Policy, ReloadOptions, options
from ..plan.known_checkpoint import KnownCheckpoint
from ..record.recorder import record_constructed
from ..report import ReloadReport
from .collected import Kept, Weights, collected, held_to, not_finite, plan_of_manifest
from .engine_state import EngineState
from .kernel_format import copy_kernel_format
from .known import known_checkpoint, learn_copy_plan, plan_for, session_for
from .partial import SMALL_UPDATE, base_of, groups_to_load, merge_updates, overlay_update, update_in_place
from .policies import policy_for_iterator, policy_for_source, require_one_rank
from .reload_call import as_reload_errors, reload_call
from .rollback import after_commit, rollback_on_failure
from .session import ReloadSession
from .session_report import ReportFacts

logger = logging.getLogger("vllm.reload_plugin")


def reload_weights(
    model: nn.Module,
    weights_iterator: Weights | None = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
    **how: Any,
) -> ReloadReport:
    """Make ``model`` the one a cold start on the new weights would give, in place.

    On a device all work is queued on the current stream of the calling thread. Tensors of the iterator have
    to be ready on that stream when they are yielded. Their memory may be overwritten, from any stream or
    process, as soon as the next pair is asked for: the copies are waited for. The device is synchronized
    before served memory is written for the first time, so forward passes that were queued on other streams
    read the old weights; and after the last write, so that those queued afterwards read the new ones.

    Args:
        model: a model of a running engine, recorded by the plugin.
        weights_iterator: (checkpoint name, tensor) pairs. A tensor may be reused by the caller as
            soon as the next pair is asked for.
        weights_path: folder or file to read instead, in any format that ``open_source`` reads; with
            neither, the engine's own model path. It is not remembered.
        is_checkpoint_format: False for tensors that are in kernel format already: exact names,
            shapes and dtypes of the served parameters and buffers.
        **how: options, all of them optional:

            * ``policy``: ``auto``, ``host``, ``spill``, ``reread`` or ``streaming``: where the old weights
              are until the new ones are whole, and what that costs; see ``options.POLICIES``.
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
            * ``together``: engines that commit together with this one, or not at all; see ``ranks.joint``.
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
    with reload_call(model, together=how.get("together")) as state, full_gc_paused(), as_reload_errors(state):
        chosen = options(**how)
        require_one_rank(state, chosen)
        if weights_iterator is not None and weights_path is not None:
            raise SourceError(f"Give weights_iterator or weights_path, not both. {SERVES_OLD}")
        if weights_iterator is not None:
            if not is_checkpoint_format:
                report = copy_kernel_format(model, weights_iterator, "the iterator", chosen)
            else:
                report = _from_iterator(model, state, weights_iterator, chosen)
        else:
            path = state.record.model_config.model if weights_path is None else str(weights_path)
            source = _opened(path, model, state, chosen.require_marker)
            if not is_checkpoint_format:
                with contextlib.closing(with_progress(source.read(), source, chosen.progress)) as weights:
                    report = copy_kernel_format(model, weights, path, chosen)
            else:
                report = from_source(model, state, source, chosen)
        seconds = report.seconds | {"total": time.perf_counter() - started}
        report = report.model_copy(update={"seconds": seconds})
        state.outcome.succeeded(report)
    settle_heap()
    return report


def record_for_reloading(model: nn.Module, vllm_config: Any = None) -> None:
    """Record a model that was not built by vLLM's loaders.

    Call it right after the model is constructed, before its weights are loaded; vLLM's
    ``process_weights_after_loading(model, ...)`` then completes the state.record.
    """
    config = vllm_config if vllm_config is not None else vllm_api.current_vllm_config()
    record_constructed(model, None, config)


def _opened(path: str, model: nn.Module, state: EngineState, marker: str | None) -> Source:
    try:
        check_config(path, state.record.model_config, state.start.config)
        return open_folder(path, state.record.vllm_config, state.record.model_config, model, marker)
    except SourceError as error:
        raise SourceError(f"{error} {SERVES_OLD}") from error.__cause__


# -- from an iterator -----------------------------------------------------------------------------


def _from_iterator(
    model: nn.Module, state: EngineState, weights: Weights, chosen: ReloadOptions
) -> ReloadReport:
    policy = policy_for_iterator(model, state, chosen)
    plan = plan_of_manifest(model, state, chosen)
    if plan is not None and not chosen.partial:
        weights = held_to(weights, plan)
    if chosen.partial:
        top = collected(weights, chosen, None if chosen.policy == "spill" else SMALL_UPDATE)
        return partially(model, state, top, chosen)
    if policy.rollback == "spill":
        return _from_spill_file(model, state, weights, chosen)
    started = time.perf_counter()
    learn_copy_plan(model, state)
    planned = time.perf_counter() - started
    facts = ReportFacts(policy.rollback, planned, plan.kept if plan is not None else None)
    known = known_checkpoint(model, state, plan, chosen.whole_model)
    with _keeping(chosen, "the iterator") as kept:
        session = _session(model, state, "the iterator", policy, known, chosen, kept, facts)
        with rollback_on_failure(model, state, session, undo=policy.undoes), session:
            session.load_last(weights)
            report = session.finish()
    after_commit(state, kept, session, plan)
    state.outcome.kept = report.kept
    return report


def _from_spill_file(
    model: nn.Module, state: EngineState, weights: Weights, chosen: ReloadOptions
) -> ReloadReport:
    """The weights go to a file, which is then reloaded like any other; it stays as the rollback source."""
    spilled = collected(weights, chosen, None)
    try:
        asked = chosen.model_copy(update={"policy": "reread", "keep_load_format": None})
        return from_source(model, state, spilled, asked, spilled=spilled.nbytes)
    except BaseException:
        spilled.close()
        raise


# -- from a source --------------------------------------------------------------------------------


def from_source(
    model: nn.Module,
    state: EngineState,
    source: Source,
    chosen: ReloadOptions,
    changed: frozenset[str] | None = None,
    sent: frozenset[str] | None = None,
    spilled: int = 0,
) -> ReloadReport:
    """Reload from weights that can be read again.

    Args:
        model: that is reloaded.
        state: of the model.
        source: of the weights.
        chosen: options.
        changed: for a partial update, the groups whose weights are others than those that are served; None
            for any.
        sent: for a partial update, the names of those weights.
        spilled: bytes that went to a file first.

    """
    if chosen.partial:
        return partially(model, state, source, chosen)
    started = time.perf_counter()
    plan = plan_for(model, state, source)
    planned = time.perf_counter() - started
    if plan is not None:
        plan.raise_mismatches(source.description)
    policy = policy_for_source(model, state, plan, chosen)
    known = known_checkpoint(model, state, plan, chosen.whole_model)
    order = plan.order if plan is not None else None
    if plan is not None and changed is not None and not chosen.whole_model:
        groups = groups_to_load(state.record, plan, changed)
        known = known.only(groups)
        wanted = frozenset(sent or ()).union(*known.names_of_group.values())
        order = order if groups is None else tuple(name for name in plan.order if name in wanted)
    rollback = "spill" if spilled else policy.rollback
    kept_by_plan = plan.kept if plan is not None else {}
    facts = ReportFacts(rollback, planned, kept_by_plan, spilled, None if sent is None else len(sent))
    with _keeping(chosen, source.description) as kept:
        ordered = getattr(source, "in_order", True)
        session = _session(model, state, source.description, policy, known, chosen, kept, facts, ordered)
        with rollback_on_failure(model, state, session, policy.undoes), session, session.undisturbed():
            reading = source.read(order, state.pool, session.parts.intake.destinations)
            watched = with_progress(reading, source, chosen.progress, order)
            with contextlib.closing(watched) as weights:
                session.load_last(weights, call_between)
            report = session.finish()
    after_commit(state, kept or source, session, plan)
    state.outcome.kept = report.kept
    return report


# -- both -----------------------------------------------------------------------------------------


def partially(model: nn.Module, state: EngineState, top: Source, chosen: ReloadOptions) -> ReloadReport:
    """Change the weights that ``top`` holds and no others. All or nothing."""
    sent = frozenset(info.name for info in top.infos() or ())
    try:
        base = base_of(model, state)
        if base is None and state.broken is not None:
            raise PartialUpdateError(
                f"The engine does not serve ({state.broken}), so a part of the weights has nothing to be "
                "added to. Reload a complete checkpoint first."
            )
        if base is None and not state.generation.known:
            raise PartialUpdateError(
                f"Nobody knows which weights are served ({state.generation.source}), so a part of them has "
                f"nothing to be added to. {SERVES_OLD} Reload a complete checkpoint first."
            )
        if base is None:
            report = update_in_place(model, state, top, chosen)
            state.replace_rollback_source(None)
            close_source(top)
            return report
        whole, changed = overlay_update(model, state, base, top)
        asked = chosen.model_copy(update={"partial": False, "keep_load_format": None})
        try:
            loads_all = state.outcome.has_cross_group_effects or state.broken is not None
            groups = None if loads_all else changed
            report = from_source(model, state, whole, asked, groups, sent)
        except ReloadError as error:
            if not isinstance(error, CrossGroupEffectError) and not isinstance(
                error.__cause__, CrossGroupEffectError
            ):
                raise  # the cause, where layers were committed already and nobody was to bring them back
            logger.info("The partial update is done once more, with all layers: %s", error)
            state.outcome.has_cross_group_effects = True
            report = from_source(model, state, whole, asked, None, sent)
    except BaseException:
        close_source(top)
        raise
    with contextlib.suppress(SourceError):  # else both stay, one over the other
        state.absorb_update(merge_updates(whole, chosen.spill_dir))
    return report


def _session(
    model: nn.Module,
    state: EngineState,
    description: str,
    policy: Policy,
    known: KnownCheckpoint,
    chosen: ReloadOptions,
    kept: Kept | None,
    facts: ReportFacts,
    in_order: bool = True,
) -> ReloadSession:
    def inspect(name: str, tensor: torch.Tensor) -> str | None:
        if kept is not None:
            kept.add(name, tensor)
        return not_finite(tensor) if chosen.check_finite else None

    session = session_for(
        model,
        state,
        description,
        policy.strategy,
        known,
        whole_model=chosen.whole_model,
        inspect=inspect if kept is not None or chosen.check_finite else None,
        spill_dir=chosen.spill_dir,
        in_order=in_order,
    )
    session.weight_version, session.digest, session.facts = chosen.weight_version, chosen.digest, facts
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
