"""Requests to an engine that does not serve are refused one by one, where vLLM takes them in.

An error of a forward pass ends an engine that runs in a process of its own, and leaves one in this process
with requests that nobody waits for. Where the worker is in the process of the scheduler, its state is looked
at. Elsewhere the workers are asked after each call that may end or begin serving; after other calls nobody
knows, and the forward pass refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import vllm_api
from ..errors import EngineBrokenError, ReloadError, SessionError
from ..transaction.engine_state import PARKED
from .patches import replace_method
from .workers import states_of

NOTE = "_reload_plugin_does_not_serve"
"""Where an engine core keeps why its workers in other processes do not serve, as an error."""
CHANGING = frozenset(
    {
        "reload_weights",
        "reset_weights",
        "update_weights",
        "finish_weight_update",
        "park_weights",
        "unpark_weights",
        "sleep",
        "wake_up",
        "discard",
    }
)
"""Calls of the workers after which an engine may serve that did not, or the other way round."""
ASKING = 1.0
"""Seconds that workers have to answer: one of them may hang, and the call before has failed for that."""
HARMLESS = frozenset({"reload_status", "parked_weights", "verify_checkpoint", "export_checkpoint"})
"""Calls that change nothing of that."""


def patch_engine() -> None:
    """Patch the places where vLLM takes requests in, as far as this process has imported them."""
    replace_method(*vllm_api.ENGINE, "add_request", refusing_in_process)
    replace_method(*vllm_api.ENGINE_CORE, "preprocess_add_request", refusing_in_core)
    replace_method(*vllm_api.ENGINE_CORE, "collective_rpc", noting)
    replace_method(*vllm_api.ENGINE_CORE, "wake_up", noting_awake)


def noting(original: Callable[..., Any]) -> Callable[..., Any]:
    """The engine core's ``collective_rpc``: notes whether the workers serve afterwards."""

    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        name = method if isinstance(method, str) else ""
        try:
            return original(self, method, *args, **kwargs)
        finally:
            if name not in HARMLESS:
                vars(self)[NOTE] = _why_not_serving(self) if name in CHANGING else None

    return collective_rpc


def noting_awake(original: Callable[..., Any]) -> Callable[..., Any]:
    """The engine core's ``wake_up``, after which weights may turn out to be lost."""

    def wake_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        returned = original(self, *args, **kwargs)
        vars(self)[NOTE] = _why_not_serving(self)
        return returned

    return wake_up


def _why_not_serving(core: Any) -> ReloadError | None:
    """What workers in other processes say; None where they serve, or where their state can be looked at."""
    if hasattr(core.model_executor, "driver_worker"):
        return None
    try:
        states = core.model_executor.collective_rpc("reload_status", ASKING, kwargs={"digest": False})
    except Exception:  # noqa: BLE001 - the call's own error is the one to raise; nobody knows then
        return None
    for said in states:
        if said["state"] == "parked":
            return SessionError(f"The engine does not serve: {PARKED}")
        if said["state"] in ("lost", "broken"):
            why = f": {said['last_error']}" if said["last_error"] else ""
            return EngineBrokenError(
                f"The engine does not serve: its weights are {said['state']} on rank {said['rank']}{why}. "
                "Reload a complete checkpoint to heal it."
            )
    return None


def refusing_in_process(original: Callable[..., Any]) -> Callable[..., Any]:
    """``LLMEngine.add_request``, where the core is in this process, so that nothing is begun.

    Raises:
        EngineBrokenError: a model of the engine holds a mixture, or has lost its weights.
        SessionError: the engine sleeps, or its weights are parked.

    """

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        core = getattr(getattr(self, "engine_core", None), "engine_core", None)
        if core is not None:
            _refuse(core)
        return original(self, *args, **kwargs)

    return add_request


def refusing_in_core(original: Callable[..., Any]) -> Callable[..., Any]:
    """The engine core's ``preprocess_add_request``, whose errors become the answer to that one request.

    Raises:
        EngineBrokenError: as ``refusing_in_process``.
        SessionError: likewise.

    """

    def preprocess_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(self)
        return original(self, *args, **kwargs)

    return preprocess_add_request


def _refuse(core: Any) -> None:
    error: ReloadError | None = vars(core).get(NOTE)
    if core.is_scheduler_paused() and not isinstance(error, SessionError):
        return  # requests wait, and weights may come before it goes on
    if error is not None:
        raise type(error)(str(error))
    driver = getattr(core.model_executor, "driver_worker", None)
    for state in states_of(getattr(driver, "worker", driver)):
        state.refuse_requests()
