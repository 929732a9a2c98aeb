"""Status: what a model serves, and the result of its last reload."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict
from torch import nn

from ..errors import ReloadError
from ..report import ReloadReport
from .engine_state import EngineState, state_of

State = Literal["serving", "updating", "parked", "asleep", "lost", "broken"]


class ReloadStatus(BaseModel):
    """State of one model on one rank."""

    model_config = ConfigDict(frozen=True)

    state: State
    """``updating``: an update is open and the old weights are served. Nothing is served in the others:
    ``parked``: the weights are in host memory until they are unparked; ``asleep``: their memory is away until
    it is woken up; ``lost``: their values are gone, by a deep sleep, a discard or a reset; ``broken``: a
    reload failed half way. A reload heals the last two.
    """
    version: int
    """Reloads committed since the start."""
    weight_version: str | None
    """The caller's name for the served weights."""
    known: bool = True
    """False where something else than a reload wrote to the served weights (``source`` says what)."""
    digest: str | None
    """Of all that the kernels read (``digest.digest``); None when it was not computed or cannot be known."""
    source: str
    """Where the served weights came from."""
    weights: str = ""
    """Where they live: a device, ``host memory (parked)``, or ``nowhere until it wakes up (asleep)``."""
    since: float
    """Unix time (s) of the commit."""
    update: str | None
    """The open update: its source, which call opened it, how many weights arrived."""
    last_error: str | None
    """The error of the last reload; None after one that succeeded."""
    report: ReloadReport | None = None
    """Of the last reload that succeeded, without the lists of what it kept and ignored."""
    rank: int = 0
    replica: int = 0
    """Which of the engine's replicas (``data_parallel_size``)."""


def status_of(model: nn.Module, digest: bool = True, rank: int = 0, replica: int = 0) -> ReloadStatus:
    """The state of a model.

    Args:
        model: a recorded model.
        digest: compute the digest if it is not known, and keep it. Reads all weights once.
        rank: this rank, for the answer.
        replica: this replica, for the answer.

    Raises:
        NotRecordedError: the model was built without the plugin.

    """
    state = state_of(model)
    known = state.served_digest() if digest or state.broken is not None else state.generation.digest
    serving, report, update = state.generation, state.outcome.report, None
    if state.update is not None:
        update = state.update.describe()
        update += f", failed: {state.update.failed}" if state.update.failed else ""
    return ReloadStatus(
        state=_state_in_a_word(state, update),
        weights=_where(state),
        version=serving.version,
        weight_version=serving.weight_version,
        known=serving.known,
        digest=None if state.broken is not None else known,
        source=serving.source,
        since=serving.since,
        update=update,
        last_error=state.broken or state.outcome.error,
        report=None if report is None else report.model_copy(update={"digest": known}),
        rank=rank,
        replica=replica,
    )


def _state_in_a_word(state: EngineState, update: str | None) -> State:
    if state.asleep:
        return "asleep"
    if state.broken is not None:
        return "lost" if state.generation.lost else "broken"
    if state.parked is not None:
        return "parked"
    return "updating" if update else "serving"


def _where(state: EngineState) -> str:
    if state.parked is not None:
        return "host memory (parked)"
    return "nowhere until it wakes up (asleep)" if state.asleep else str(state.record.target_device)


def status(engine: Any, digest: bool = True) -> list[ReloadStatus]:
    """The state of every rank of a running engine; over HTTP: ``/collective_rpc`` with ``reload_status``.

    Args:
        engine: a ``vllm.LLM`` (or anything else with ``collective_rpc``), or a model in this process.
        digest: compute the digest if it is not known.

    """
    if isinstance(engine, nn.Module):
        return [status_of(engine, digest)]
    _require_sync(engine, "status")
    answers = engine.collective_rpc("reload_status", kwargs={"digest": digest})
    return [ReloadStatus.model_validate(answer) for answer in answers]


logger = logging.getLogger("vllm.reload_plugin")

Cache = Literal["prefix", "encoder", "multimodal"]


def reload_engine(
    llm: Any, weights_path: str | None = None, reset_caches: Iterable[Cache] = (), **how: Any
) -> list[ReloadStatus]:
    """Reload all ranks of a ``vllm.LLM`` from disk, and reset caches that depend on its weights when asked.

    Args:
        llm: a running engine.
        weights_path: folder to read; None for the engine's own model path.
        reset_caches: ``prefix`` (keys and values of shared prompts), ``encoder`` and ``multimodal`` (outputs
            of encoders). Other caches are not reset, except the outputs of encoders in the workers, which
            vLLM's runners drop after every reload.
        **how: options of ``reload_weights``.

    Returns:
        The state of every rank; ``report.caches`` says of each cache whether it was reset, and why not: vLLM
        resets no prefix cache of which a running request holds a block. The new weights are served then.

    Raises:
        ReloadError: the reload failed and the engine serves what it served before.

    """
    asked = _known(reset_caches)
    _require_sync(llm, "reload_engine")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": weights_path, **how})
    engine = llm.llm_engine
    calls = {
        "prefix": engine.reset_prefix_cache,
        "encoder": engine.reset_encoder_cache,
        "multimodal": engine.reset_mm_cache,
    }
    if asked:
        outcomes = {cache: _reset(cache, calls[cache]) for cache in asked}
        llm.collective_rpc("note_reset_caches", kwargs={"outcomes": outcomes})
    return status(llm)


def _reset(cache: Cache, call: Callable[[], object]) -> str:
    """Reset one cache; returns the outcome. Never raises, because the new weights are served already."""
    try:
        return _outcome(cache, "" if call() is not False else HELD)
    except Exception as error:  # noqa: BLE001 - any error is part of the outcome
        return _outcome(cache, f"{type(error).__name__}: {error}")


async def _reset_async(cache: Cache, call: Callable[[], Awaitable[object]]) -> str:
    """Likewise."""
    try:
        return _outcome(cache, "" if await call() is not False else HELD)
    except Exception as error:  # noqa: BLE001 - any error is part of the outcome
        return _outcome(cache, f"{type(error).__name__}: {error}")


HELD = "running requests hold parts of it; reset it when they have ended"


def _outcome(cache: Cache, reason: str) -> str:
    if reason:
        logger.warning("The %s cache holds results of the old weights. It was not reset: %s", cache, reason)
    return f"not reset: {reason}" if reason else "reset"


async def status_async(engine: Any, digest: bool = True) -> list[ReloadStatus]:
    """The state of every rank of every replica of an ``AsyncLLM``; see ``status``."""
    answers = await engine.collective_rpc("reload_status", kwargs={"digest": digest})
    return [ReloadStatus.model_validate(answer) for answer in answers]


async def reload_engine_async(
    engine: Any, weights_path: str | None = None, reset_caches: Iterable[Cache] = (), **how: Any
) -> list[ReloadStatus]:
    """Reload all ranks of all replicas of an ``AsyncLLM`` from disk; see ``reload_engine``.

    Every replica commits, or none does. While it is reloaded a replica answers no requests.
    """
    asked = _known(reset_caches)
    await engine.collective_rpc("reload_weights", kwargs={"weights_path": weights_path, **how})
    calls = {
        "prefix": engine.reset_prefix_cache,
        "encoder": engine.reset_encoder_cache,
        "multimodal": engine.reset_mm_cache,
    }
    if asked:
        outcomes = {cache: await _reset_async(cache, calls[cache]) for cache in asked}
        await engine.collective_rpc("note_reset_caches", kwargs={"outcomes": outcomes})
    return await status_async(engine)


def _known(caches: Iterable[Cache]) -> tuple[Cache, ...]:
    asked = tuple(caches)
    if unknown := sorted(set(asked) - set(get_args(Cache))):
        raise ReloadError(f"No cache is called {', '.join(unknown)}: {', '.join(get_args(Cache))} are.")
    return asked


def _require_sync(engine: Any, name: str) -> None:
    """A coroutine that nobody waits for would do nothing, and nobody would know."""
    if inspect.iscoroutinefunction(engine.collective_rpc):
        raise ReloadError(f"{type(engine).__name__} answers asynchronously: await {name}_async(...) instead.")
