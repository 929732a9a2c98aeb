"""What the engine serves and how to get it back; what was learnt about its weights.

All that one reload leaves behind for the next is kept here, on the model's record: routes and plans, the
source of the served generation if it can be read again, and whether the model is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import vllm_api
from ..checkpoint import Source, TensorInfo, give_back, kept_open, layers_of, open_folder
from ..checkpoint.formats.safetensors_files import SafetensorsSource
from ..errors import EngineBrokenError, ReloadError, SessionError, SourceError
from ..interrupts import call_held, held
from ..load.overflow import Overflow
from ..plan.checkpoint_plan import Plan, PlanUnavailableError, make_plan
from ..plan.copy_plan import CopyPlan
from ..plan.known_checkpoint import KnownCheckpoint
from ..ranks.votes import vote_for
from ..record.model_record import ModelRecord
from ..record.placement import placement
from ..report import ReloadReport
from .session import SERVES_OLD, Policy, ReloadSession, SessionState, complete_record_of

logger = logging.getLogger("vllm.reload_plugin")

# -- what is known --------------------------------------------------------------------------------


def expected(
    model: nn.Module, record: ModelRecord, plan: Plan | None = None, whole_model: bool = False
) -> KnownCheckpoint:
    """What is known of the weights of the next reload: from a plan of theirs, or from the last reload."""
    if plan is not None:
        names, copy_plan = plan.names_of_group, plan.copy_plan
    else:
        names, copy_plan = record.names_of_group or {}, known_copy_plan(record, whole_model)
    return KnownCheckpoint(
        names, plan is not None, copy_plan, _was_written(model, record), _start_shapes(model, record)
    )


def session_for(
    model: nn.Module,
    record: ModelRecord,
    description: str,
    policy: Policy,
    known: KnownCheckpoint,
    **chosen: Any,
) -> ReloadSession:
    """A session over a model that puts weights aside on disk when they come in too wild an order."""
    folder = chosen.pop("spill_dir", None)

    def order(infos: Any) -> Any:
        return _order(model, record, infos)

    in_order = chosen.pop("in_order", True) and policy == "streaming" and known.planned
    overflow = None if in_order else Overflow(folder, order)
    return ReloadSession(
        model,
        source=description,
        policy=policy,
        expected=known,
        overflow=overflow,
        agree=record.vote,
        **chosen,
    )


def _order(model: nn.Module, record: ModelRecord, infos: list[TensorInfo]) -> list[str]:
    """Names layer by layer: by routes where they are known, else by what the loader does on meta tensors."""
    names = [info.name for info in infos]
    copy_plan = record.copy_plan.of if record.copy_plan is not None else {}
    if not all(name in copy_plan for name in names):
        with contextlib.suppress(PlanUnavailableError, ReloadError):
            return list(make_plan(model, infos, "the weights put aside").order)
        return names

    def first_group(name: str) -> list[int]:
        return [record.group_of[copy.parameter] for copy in copy_plan[name].copies or ()][:1]

    return sorted(names, key=first_group)


def learn_copy_plan(model: nn.Module, record: ModelRecord) -> None:
    """Before weights that nobody lists: learn their routes, from the last ones or from the engine's own
    checkpoint. Costs one pass of the model's loader over meta tensors, once for each placement.
    """
    here = placement(record)
    if record.copy_plan is not None and record.copy_plan.key == here:
        return
    infos = _last_infos(record)
    if infos is None and record.planned_for is not None and record.planned_for[0] == here:
        return
    if infos is None and (source := _start_source(model, record)) is not None:
        infos = source.infos()
    if not infos or record.planned_for == (here, infos):
        return
    record.planned_for = here, infos
    with contextlib.suppress(PlanUnavailableError, ReloadError):
        plan = make_plan(model, infos, "the last weights", _of_start(model, record))
        if not plan.mismatches:
            record.names_of_group, record.copy_plan = dict(plan.names_of_group), plan.copy_plan


def _last_infos(record: ModelRecord) -> Any:
    """What the last reload brought, if there was one."""
    if record.copy_plan is not None:
        return [
            TensorInfo(name, tensor_plan.shape, tensor_plan.dtype)
            for name, tensor_plan in record.copy_plan.of.items()
        ]
    return record.last_infos


def plan_for(model: nn.Module, record: ModelRecord, source: Source) -> Plan | None:
    """The plan of a source that can be listed; None when the model's loader cannot be planned."""
    infos = source.infos()
    if infos is None:
        return None
    if record.plan is not None and record.plan.still_holds(model, infos):
        kept: Plan = record.plan
        return kept
    try:
        made = make_plan(model, infos, source.description, _of_start(model, record))
    except PlanUnavailableError as reason:
        logger.info("No preflight for %s: %s", source.description, reason)
        return None
    record.plan = made
    return made


def _of_start(model: nn.Module, record: ModelRecord) -> KnownCheckpoint:
    return KnownCheckpoint(was_written=_was_written(model, record), start_shapes=_start_shapes(model, record))


def known_copy_plan(record: ModelRecord, whole_model: bool = False) -> CopyPlan | None:
    """Where weights go, if it was learnt and experts have not moved since."""
    known: CopyPlan | None = record.copy_plan
    return known if known is not None and not whole_model and known.key == placement(record) else None


def _start_source(model: nn.Module, record: ModelRecord) -> Source | None:
    """The checkpoint in the engine's own model path, if it can be listed."""
    try:
        source = open_folder(record.model_config.model, record.vllm_config, record.model_config, model)
    except ReloadError:
        return None
    return source if source.infos() is not None else None


def _start_shapes(model: nn.Module, record: ModelRecord) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the engine's own checkpoint, in the order in which a cold start loads it; empty when
    it cannot be listed.
    """
    if record.start_shapes is None:
        source = _start_source(model, record)
        record.start_shapes = {info.name: info.shape for info in _as_loaded(source)}
    return record.start_shapes


def _as_loaded(source: Source | None) -> Sequence[TensorInfo]:
    """What a source lists, in the order in which vLLM loads it at a start: file by file, and of safetensors
    by name in each (``safetensors_weights_iterator``, ``safe_open.keys``).
    """
    infos = (source.infos() if source is not None else None) or ()
    if not isinstance(source, SafetensorsSource):
        return infos
    file_of = source.file_of
    files = {path: place for place, path in enumerate(sorted(set(file_of.values()), key=_with_numbers))}
    return sorted(infos, key=lambda info: (files[file_of[info.name]], info.name))


def _with_numbers(path: str) -> list[tuple[int, str]]:
    """To sort files by: numbers in their names count as numbers."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _was_written(model: nn.Module, record: ModelRecord) -> Callable[[str], str | None]:
    """How completely the engine's own checkpoint writes a parameter; traced when first asked."""

    def was_written(parameter: str) -> str | None:
        if record.start_coverage is None:
            record.start_coverage = {}
            source = _start_source(model, record)
            with contextlib.suppress(PlanUnavailableError, ReloadError):
                if source is not None:
                    known = KnownCheckpoint(start_shapes=_start_shapes(model, record))
                    plan = make_plan(model, source.infos() or (), source.description, known)
                    record.start_coverage = plan.coverage
        return record.start_coverage.get(parameter)

    return was_written


# -- the way back ---------------------------------------------------------------------------------


class DummyWeights:
    """The weights of an engine started with ``load_format=dummy``: made anew, the same every time."""

    description = "vLLM's dummy weights"

    def unchanged(self) -> bool:
        return True


def has_rollback_source(model: nn.Module, record: ModelRecord) -> bool:
    """Whether the served weights could be loaded again, should a reload fail half way."""
    if record.generation.version == 0 and record.rollback_source is None and record.broken is None:
        record.rollback_source = _start_generation(model, record)
    good = record.rollback_source
    return good is not None and bool(good.unchanged())


def _start_generation(model: nn.Module, record: ModelRecord) -> Source | DummyWeights | None:
    """What a cold start loaded, if it can be loaded again."""
    if vllm_api.starts_from_dummy(record.vllm_config):
        return DummyWeights()
    if record.start_stamps is None:  # then looking is in vain, and may ask a hub
        return None
    source = _start_source(model, record)
    return source if getattr(source, "stamps", None) == record.start_stamps else None


@contextlib.contextmanager
def rollback_on_failure(
    model: nn.Module, record: ModelRecord, session: ReloadSession, undo: bool = True
) -> Iterator[None]:
    """A failure after some layers were committed brings the old weights back, or says that it cannot."""
    before = record.generation
    with contextlib.ExitStack() as stack:
        if undo:
            _hold_rollback_source(model, record, session.policy, stack)
        try:
            yield
        except BaseException as error:
            if session.state is SessionState.COMMITTED:  # Ctrl-C, just after: the new weights stay
                session.abort()
                record.session = None if record.session is session else record.session
                after_commit(record, None, session)
            elif session.committed:
                if record.vote is not None and record.vote.committed:
                    raise  # the other ranks have the new weights: see with_all_ranks
                if not undo:
                    raise _broken(record, f"a streaming reload failed half way: {error}") from error
                _roll_back(model, record)
                record.generation = before
            raise


def _hold_rollback_source(
    model: nn.Module, record: ModelRecord, policy: Policy, stack: contextlib.ExitStack
) -> None:
    """Keep the files of the served weights open: a trainer may delete them just when the next ones come."""
    has_rollback_source(model, record)  # for what the engine started from
    try:
        stack.enter_context(kept_open(record.rollback_source))
    except (OSError, SourceError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if policy == "streaming" and not full:
            raise SourceError(
                f"The weights that are served cannot be read again ({error}), as a failure would ask for. "
                f"{SERVES_OLD} Reload once more: without that way back a copy is kept until the commit."
            ) from error


def _roll_back(model: nn.Module, record: ModelRecord) -> None:
    """Some layers were committed and then the reload failed: load the last good weights again."""
    good = record.rollback_source
    try:
        if good is None or not good.unchanged():
            raise SourceError("the weights served before are gone")
        with session_for(model, record, good.description, "streaming", expected(model, record)) as session:
            session.digest = "later"
            if isinstance(good, DummyWeights):
                with session.loading():
                    vllm_api.load_dummy(record.vllm_config, record.model_config, model)
                session.finish(check=False)
            else:
                session.load(good.read(), call_held)
                session.finish()
    except BaseException as error:
        reason = f"a reload failed half way and the weights served before could not be read: {error}"
        raise _broken(record, reason) from error
    logger.warning("A reload failed after some layers were committed; the old weights were read again.")


def _broken(record: ModelRecord, reason: str) -> EngineBrokenError:
    record.broken = reason
    return EngineBrokenError(
        f"The engine holds a mixture of two generations and refuses to serve: {reason}. "
        "Reload a complete checkpoint to heal it."
    )


CACHES = {
    "prefix": "not reset by the reload; reset_prefix_cache() on the engine drops it",
    "encoder": "not reset by the reload; reset_encoder_cache() on the engine drops it",
    "multimodal": "not reset by the reload; reset_mm_cache() on the engine drops it",
}
"""Caches that depend on the weights of an engine, and what a reload of one model can say about each."""
EMPTIED_BY_RUNNER = {
    "encoder": "emptied in the worker by vLLM's runner; the scheduler still lists what it held: "
    "reset_encoder_cache() on the engine resets both",
}
"""What both of vLLM's runners do after the weights changed."""


def note_report(record: ModelRecord, report: ReloadReport) -> ReloadReport:
    """Keep a good reload's report, without its long lists, for ``status``. Returns it, all caches named."""
    report = report.model_copy(update={"caches": CACHES})
    record.last_error = None
    record.last_report = report.model_copy(update={"kept": {}, "ignored": {}})
    return report


def note_caches(record: ModelRecord, outcomes: dict[str, str]) -> None:
    """Put into the last report what became of some caches after the reload."""
    if record.last_report is not None:
        caches = record.last_report.caches | outcomes
        record.last_report = record.last_report.model_copy(update={"caches": caches})


def after_commit(
    record: ModelRecord, source: Source | None, session: ReloadSession, plan: Plan | None = None
) -> None:
    """What a good reload leaves behind for the next one. ``source`` gives its weights again, if any does."""
    replace_rollback_source(record, source)
    if plan is not None:
        record.names_of_group, record.copy_plan = dict(plan.names_of_group), plan.copy_plan
    elif session.completeness.took_loader:
        if record.copy_plan is not None:
            record.planned_for = None
        record.names_of_group, record.copy_plan = session.completeness.names_of_group(record), None
        arrived = session.completeness.arrived
        record.last_infos = [
            TensorInfo(name, tensor_plan.shape, tensor_plan.dtype) for name, tensor_plan in arrived.items()
        ]
    record.broken = record.last_error = None


def replace_rollback_source(record: ModelRecord, source: Source | None) -> None:
    """The served weights come from ``source`` now; what the old one holds is given back."""
    old, record.rollback_source = record.rollback_source, source
    kept = {id(layer) for layer in layers_of(source)}
    for layer in layers_of(old):
        if id(layer) not in kept:
            give_back(layer)


# -- one weight update at a time, and none half served --------------------------------------------


def before_forward_pass(record: ModelRecord) -> None:
    """Called before every forward pass of a model: an open update is hidden, a broken model refuses.

    Raises:
        EngineBrokenError: the model holds a mixture of two generations, or has lost its weights.

    """
    if record.session is not None:
        with held():
            record.session.hide()
    if record.broken is not None:
        raise EngineBrokenError(
            f"The engine does not serve: {record.broken}. Reload a complete checkpoint to heal it."
        )


def mark_lost(record: ModelRecord, reason: str) -> None:
    """The served weights are gone: nothing is served until a reload heals the model.

    Their digest is forgotten and their rollback source is given back, so that nothing is built upon them.
    """
    record.broken = reason
    record.generation = dataclasses.replace(record.generation, digest=None)
    replace_rollback_source(record, None)


@contextlib.contextmanager
def noting_failures(model: nn.Module) -> Iterator[ModelRecord]:
    """The model's record, for one reload; what the reload fails with is kept for ``status``.

    Raises:
        SessionError: a weight update is open and well; it says whose.

    """
    record = complete_record_of(model)
    with held():
        try:
            with with_all_ranks(record):
                refuse_while_update_open(record)
                yield record
        except BaseException as error:
            record.last_error = f"{type(error).__name__}: {error}"
            raise


@contextlib.contextmanager
def as_reload_errors(record: ModelRecord) -> Iterator[None]:
    """Whatever goes wrong in code of ours or of vLLM's says what is served now."""
    before = record.generation
    try:
        yield
    except ReloadError:
        raise
    except Exception as error:
        now = SERVES_OLD if record.generation is before else "The new weights are served."
        raise ReloadError(f"The reload failed with {type(error).__name__}: {error}. {now}") from error


@contextlib.contextmanager
def with_all_ranks(record: ModelRecord) -> Iterator[None]:
    """One reload on every rank of the model: what fails here before the commit fails everywhere.

    A commit itself cannot be taken back elsewhere: a rank on which it fails refuses to serve.

    Raises:
        RanksDisagreeError: another rank failed, or did not get ready in time.
        EngineBrokenError: the other ranks have committed and this one could not.

    """
    vote = record.vote = vote_for(record)
    before = record.generation
    try:
        yield
    except BaseException as error:
        if vote is not None and vote.committed and record.generation is before:
            reason = f"the other ranks committed a reload that failed here: {error}"
            raise _broken(record, reason) from error
        if vote is not None:
            vote(error)
        raise
    finally:
        record.vote = None
    if vote is not None and vote.postponed is not None:
        raise vote.postponed


def refuse_while_update_open(record: ModelRecord) -> None:
    """Only one update at a time. One that failed is over when the next begins; one that is well is not."""
    session = record.session
    if session is None:
        return
    if session.failed:
        logger.warning("The weight update that failed (%s) is dropped for the next one.", session.failed)
        abandon_open_session(record)
        return
    raise SessionError(
        f"A weight update is open: {session.source}, {session.holder}, {session.loaded.count} weights "
        "so far. The engine serves what it served before. Finish it or abort it (abort_weight_update) first."
    )


def abandon_open_session(record: ModelRecord) -> None:
    """End the open weight update, if there is one; its weights were never served."""
    if record.session is not None:
        record.session.abort()
        record.session = None


def abandon_updates(records: Iterable[ModelRecord]) -> bool:
    """End the open weight updates of some models. Says whether one was open."""
    opened = [record for record in records if record.session is not None]
    for record in opened:
        abandon_open_session(record)
    return bool(opened)
