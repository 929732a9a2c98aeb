"""Requests to an engine that does not serve are refused one by one, where vLLM takes them in.

An error of a forward pass ends an engine that runs in a process of its own, and leaves one in this process
with requests that nobody waits for. An engine whose worker is in the process of the scheduler tells so early,
and so does any engine whose weights are parked; the others refuse at the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import vllm_api
from ..errors import SessionError
from ..transaction.engine_state import PARKED
from .patches import replace_method
from .workers import states_of

PARKED_NOTE = "_reload_plugin_parked"
"""Where an engine core keeps whether its workers' weights are parked."""


def patch_engine() -> None:
    """Patch the places where vLLM takes requests in, as far as this process has imported them."""
    replace_method(*vllm_api.ENGINE, "add_request", refusing_in_process)
    replace_method(*vllm_api.ENGINE_CORE, "preprocess_add_request", refusing_in_core)


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
    if vars(core).get(PARKED_NOTE):
        raise SessionError(f"The engine does not serve: {PARKED}")
    if core.is_scheduler_paused():
        return  # requests wait, and weights may come before it goes on
    driver = getattr(core.model_executor, "driver_worker", None)
    for state in states_of(getattr(driver, "worker", driver)):
        state.refuse_requests()
