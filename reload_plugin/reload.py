"""Reloading a model from an iterator or from disk: chooses the policy, keeps the promise.

Weights that can be listed are planned first and refused before anything is touched. Weights that can
only be iterated are staged in full before they are committed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from . import _vllm
from .errors import EngineBrokenError, ReloadError, SourceError
from .kernel_format import copy_kernel_format
from .memory import HostPool, trim_heap
from .plan import Plan, PlanUnavailableError, make_plan
from .record import ModelRecord, record_constructed
from .routes import Routes
from .session import SERVES_OLD, Policy, ReloadSession, State, complete_record_of, placement
from .sources import Source, TensorInfo, open_folder
from .verify import ReloadReport

logger = logging.getLogger("vllm.reload_plugin")

Weights = Iterable[tuple[str, torch.Tensor]]


def reload_weights(
    model: nn.Module,
    weights_iterator: Weights | None = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
    *,
    whole_model: bool = False,
) -> ReloadReport:
    """Make ``model`` the one a cold start on the new weights would give, in place.

    Args:
        model: a model of a running engine, recorded by the plugin.
        weights_iterator: (checkpoint name, tensor) pairs. A tensor may be reused by the caller as
            soon as the next pair is asked for.
        weights_path: folder to read instead; with neither, the engine's own model path. It is not
            remembered.
        is_checkpoint_format: False for tensors that are in kernel format already: exact names,
            shapes and dtypes of the served parameters and buffers.
        whole_model: load everything before anything is processed; for models whose loader comes
            back to layers it has finished.

    Returns:
        What was loaded, kept and ignored, and what it cost.

    Raises:
        ReloadError: the reload failed and the engine serves what it served before.
        EngineBrokenError: it failed while layers were committed one by one and the old weights
            could not be brought back; the engine refuses to serve until a reload succeeds.

    """
    record = complete_record_of(model)
    abandon_open_session(record)
    if weights_iterator is not None and weights_path is not None:
        raise SourceError(f"Give weights_iterator or weights_path, not both. {SERVES_OLD}")
    if weights_iterator is not None:
        if not is_checkpoint_format:
            return copy_kernel_format(model, weights_iterator, "the iterator")
        return _reload_from_iterator(model, record, weights_iterator, whole_model)
    path = record.model_config.model if weights_path is None else str(weights_path)
    try:
        source = open_folder(path, record.vllm_config, record.model_config, model)
    except SourceError as error:
        raise SourceError(f"{error} {SERVES_OLD}") from error.__cause__
    if not is_checkpoint_format:
        return copy_kernel_format(model, source.read(), path)
    return _reload_from_source(model, record, source, whole_model)


@contextlib.contextmanager
def restore_for_reloading(model: nn.Module) -> Iterator[ReloadSession]:
    """Inside the block ``model.load_weights`` reloads: any number of calls, one commit at the end.

    The block works on the load format: parameters have the shapes and loaders of a freshly built
    model. Leaving it normally checks that everything came, processes and commits; leaving it by an
    exception puts the old weights back.

    Raises:
        WeightsError: at the end of the block, listing all that does not fit.

    """
    record = complete_record_of(model)
    abandon_open_session(record)
    session = _session(model, record, "model.load_weights", "staged", None)
    with _whole_or_broken(model, record, session), session:
        session.take_over()
        with session.loading():
            yield session
        session.finish()
    _after_commit(record, None, session)


def record_for_reloading(model: nn.Module, vllm_config: Any = None) -> None:
    """Record a model that was not built by vLLM's loaders.

    Call it right after the model is constructed, before its weights are loaded; vLLM's
    ``process_weights_after_loading(model, ...)`` then completes the record.
    """
    config = vllm_config if vllm_config is not None else _vllm.current_vllm_config()
    record_constructed(model, None, config)


# -- vLLM's layerwise calls -----------------------------------------------------------------------


def open_layerwise(model: nn.Module) -> None:
    """vLLM's ``initialize_layerwise_reload``: from now on ``model.load_weights`` stages a reload."""
    record = complete_record_of(model)
    abandon_open_session(record)
    session = _session(model, record, "a weight update", "staged", None)
    session.open()
    session.take_over()
    record.session = session
    _attention.add(record)


def finish_layerwise(model: nn.Module) -> ReloadReport:
    """vLLM's ``finalize_layerwise_reload``: check, process, commit."""
    record = complete_record_of(model)
    session = record.session
    if session is None:
        raise ReloadError(f"No weight update is open: none was started, or it failed. {SERVES_OLD}")
    record.session = None
    _attention.discard(record)
    with _whole_or_broken(model, record, session):
        try:
            report: ReloadReport = session.finish()
        finally:
            session.abort()
    _after_commit(record, None, session)
    return report


def abandon_open_session(record: ModelRecord) -> None:
    """A session that was opened and never finished ends here; its weights were never served."""
    if record.session is not None:
        logger.warning("A weight update that was started and never finished is abandoned.")
        record.session.abort()
        record.session = None
        _attention.discard(record)


_attention: set[ModelRecord] = set()
"""Records with an open weight update or a broken model; nearly always empty."""


def before_serving() -> None:
    """Called before every forward pass: an open update steps aside, a broken model refuses.

    Raises:
        EngineBrokenError: the model holds a mixture of two generations.

    """
    for record in list(_attention):
        if record.session is not None:
            record.session.hide()
        if record.broken is not None:
            raise EngineBrokenError(
                f"The engine does not serve: {record.broken}. Reload a complete checkpoint to heal it."
            )


# -- from an iterator, from a source --------------------------------------------------------------


def _reload_from_iterator(
    model: nn.Module, record: ModelRecord, weights: Weights, whole_model: bool
) -> ReloadReport:
    _learn_routes(model, record)
    session = _session(model, record, "the iterator", "staged", None, whole_model)
    with _whole_or_broken(model, record, session), session:
        session.load(weights)
        report = session.finish()
    kept = {name: rule for name, rule in record.kept.items() if session.ledger.took_by_name(name)}
    report = report.model_copy(update={"kept": kept | report.kept})
    _after_commit(record, None, session)
    record.kept = report.kept
    return report


def _reload_from_source(
    model: nn.Module, record: ModelRecord, source: Source, whole_model: bool
) -> ReloadReport:
    plan = _plan_for(model, record, source)
    if plan is not None:
        plan.raise_problems(source.description)
    restorable = plan is not None and _can_bring_back(model, record)
    policy: Policy = "streaming" if restorable and not whole_model else "staged"
    pool = HostPool()
    session = _session(model, record, source.description, policy, plan, whole_model, pool)
    with _whole_or_broken(model, record, session), session:
        order = plan.order if plan is not None else None
        with contextlib.closing(source.read(order, pool, session.room_for)) as weights:
            session.load(weights)
        report = session.finish()
    if plan is not None:
        report = report.model_copy(update={"kept": plan.kept | report.kept})
    _after_commit(record, source, session, plan)
    record.kept = report.kept
    return report


@contextlib.contextmanager
def _whole_or_broken(model: nn.Module, record: ModelRecord, session: ReloadSession) -> Iterator[None]:
    """A failure after some layers were committed brings the old weights back, or says that it cannot."""
    try:
        yield
    except BaseException:
        if session.committed and session.state is not State.COMMITTED:
            _bring_back(model, record)
        raise


def _session(
    model: nn.Module,
    record: ModelRecord,
    description: str,
    policy: Policy,
    plan: Plan | None,
    whole_model: bool = False,
    pool: HostPool | None = None,
) -> ReloadSession:
    return ReloadSession(
        model,
        source=description,
        policy=policy,
        whole_model=whole_model,
        names_of_group=plan.names_of_group if plan is not None else record.learnt,
        routes=plan.routes if plan is not None else _known_routes(record, whole_model),
        planned=plan is not None,
        pool=pool,
        was_written=_knowledge(model, record),
        start_shapes=_start_shapes(model, record),
    )


def _learn_routes(model: nn.Module, record: ModelRecord) -> None:
    """Before a reload from an iterator: learn its routes, from the last one or from the engine's own
    checkpoint. Costs one pass of the model's loader over meta tensors, once.
    """
    if record.routes is not None or record.learnt_from is not None:
        return
    source = _start_source(model, record) if record.last_infos is None else None
    infos = record.last_infos or (source.infos() if source is not None else None)
    if not infos:
        return
    record.learnt_from = infos
    with contextlib.suppress(PlanUnavailableError, ReloadError):
        shapes = _start_shapes(model, record)
        plan = make_plan(model, infos, "the last weights", _knowledge(model, record), shapes)
        if not plan.problems:
            record.learnt, record.routes = dict(plan.names_of_group), plan.routes


def _known_routes(record: ModelRecord, whole_model: bool) -> Routes | None:
    known = record.routes
    return known if known is not None and not whole_model and known.key == placement(record) else None


def _plan_for(model: nn.Module, record: ModelRecord, source: Source) -> Plan | None:
    infos = source.infos()
    if infos is None:
        return None
    if record.plan is not None and record.plan.still_holds(model, infos):
        kept: Plan = record.plan
        return kept
    try:
        shapes = _start_shapes(model, record)
        made = make_plan(model, infos, source.description, _knowledge(model, record), shapes)
    except PlanUnavailableError as reason:
        logger.info("No preflight for %s: %s", source.description, reason)
        return None
    record.plan = made
    return made


def _start_source(model: nn.Module, record: ModelRecord) -> Source | None:
    """The checkpoint in the engine's own model path, if it can be listed."""
    try:
        source = open_folder(record.model_config.model, record.vllm_config, record.model_config, model)
    except ReloadError:
        return None
    return source if source.infos() is not None else None


def _start_shapes(model: nn.Module, record: ModelRecord) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the engine's own checkpoint; empty when it cannot be listed."""
    if record.start_shapes is None:
        source = _start_source(model, record)
        infos = (source.infos() if source is not None else None) or ()
        record.start_shapes = {info.name: info.shape for info in infos}
    return record.start_shapes


def _knowledge(model: nn.Module, record: ModelRecord) -> Callable[[str], str | None]:
    """How completely the engine's own checkpoint writes a parameter; traced when first asked."""

    def was_written(parameter: str) -> str | None:
        if record.start_coverage is None:
            record.start_coverage = {}
            source = _start_source(model, record)
            with contextlib.suppress(PlanUnavailableError, ReloadError):
                if source is not None:
                    shapes = _start_shapes(model, record)
                    plan = make_plan(model, source.infos() or (), source.description, start_shapes=shapes)
                    record.start_coverage = plan.coverage
        return record.start_coverage.get(parameter)

    return was_written


def _after_commit(
    record: ModelRecord, source: Source | None, session: ReloadSession, plan: Plan | None = None
) -> None:
    """What a good reload leaves behind for the next one."""
    record.last_good = source
    if plan is not None:
        record.learnt, record.routes = dict(plan.names_of_group), plan.routes
    elif session.ledger.took_loader:
        record.learnt, record.routes = session.ledger.learnt(record), None
        arrived = session.loaded.routes
        record.last_infos = [TensorInfo(name, route.shape, route.dtype) for name, route in arrived.items()]
        record.learnt_from = None
    record.broken = None
    _attention.discard(record)
    trim_heap()


def _can_bring_back(model: nn.Module, record: ModelRecord) -> bool:
    """Whether the served weights could be loaded again, should a reload fail half way."""
    if record.version == 0 and record.last_good is None:
        record.last_good = _start_generation(model, record)
    good = record.last_good
    return good is not None and bool(good.unchanged())


class DummyWeights:
    """The weights of an engine started with ``load_format=dummy``: made anew, the same every time."""

    description = "vLLM's dummy weights"

    def unchanged(self) -> bool:
        return True


def _start_generation(model: nn.Module, record: ModelRecord) -> Source | DummyWeights | None:
    """What a cold start loaded, if it can be loaded again."""
    if _vllm.starts_from_dummy(record.vllm_config):
        return DummyWeights()
    source = _start_source(model, record) if _vllm.starts_from_files(record.vllm_config) else None
    same = source is not None and getattr(source, "stamps", None) == record.start_stamps
    return source if same else None


def _bring_back(model: nn.Module, record: ModelRecord) -> None:
    """Some layers were committed and then the reload failed: load the last good weights again."""
    good = record.last_good
    try:
        if good is None or not good.unchanged():
            raise SourceError("the weights served before are gone")
        with _session(model, record, good.description, "streaming", None) as session:
            if isinstance(good, DummyWeights):
                with session.loading():
                    _vllm.load_dummy(record.vllm_config, record.model_config, model)
                session.finish(check=False)
            else:
                session.load(good.read())
                session.finish()
    except BaseException as error:
        record.broken = f"a reload failed half way and the weights served before could not be read: {error}"
        _attention.add(record)
        raise EngineBrokenError(
            f"The engine holds a mixture of two generations and refuses to serve: {record.broken}. "
            "Reload a complete checkpoint to heal it."
        ) from error
    record.version -= 1
    logger.warning("A reload failed after some layers were committed; the old weights were read again.")
