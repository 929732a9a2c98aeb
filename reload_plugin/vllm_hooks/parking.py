"""What ``collective_rpc`` reaches in vLLM's worker to park its weights (see ``offload.park``), and the
refusal of requests meanwhile where they come in: one that fails in a worker ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import vllm_api
from ..errors import SessionError
from ..export.answers import told
from ..offload.park import park_models, unpark_models, where_models_are
from ..record.model_record import record_of
from ..transaction.engine_state import PARKED
from .patches import add_method, replace_method


def add_parking_calls(worker: type) -> None:
    """Add ``park_weights``, ``unpark_weights`` and ``parked_weights`` to vLLM's worker."""

    def park_weights(self: Any) -> dict[str, Any] | None:
        """Put the weights of this worker's models into host memory."""
        sleeps = vllm_api.has_sleep_mode(getattr(self, "vllm_config", None))
        return told(lambda: park_models(_models(self), sleeps, _rank(self)))

    def unpark_weights(self: Any) -> dict[str, Any] | None:
        """Bring them back to the device."""
        return told(lambda: unpark_models(_models(self), _rank(self)))

    def parked_weights(self: Any) -> dict[str, Any] | None:
        """Where they are."""
        return told(lambda: where_models_are(_models(self), _rank(self)))

    for function in (park_weights, unpark_weights, parked_weights):
        add_method(worker, function)


def patch_engine_core() -> None:
    """Patch vLLM's ``EngineCore``, where this process has imported it."""
    replace_method(*vllm_api.ENGINE_CORE, "collective_rpc", noting_parked)
    replace_method(*vllm_api.ENGINE_CORE, "preprocess_add_request", refusing_while_parked)


_NOTE = "_reload_plugin_parked"
"""Where an engine core keeps whether its workers' weights are parked."""


def noting_parked(original: Callable[..., Any]) -> Callable[..., Any]:
    """The engine core's ``collective_rpc``, by which its workers are told to park."""

    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        answers = original(self, method, *args, **kwargs)
        if method in ("park_weights", "unpark_weights"):
            states = {answer.get("state") for answer in answers if isinstance(answer, dict)}
            if method == "park_weights":
                vars(self)[_NOTE] = states == {"parked"}
            elif states == {"serving"}:
                vars(self)[_NOTE] = False
        return answers

    return collective_rpc


def refusing_while_parked(original: Callable[..., Any]) -> Callable[..., Any]:
    """The engine core's ``preprocess_add_request``, whose errors concern one request only.

    Raises:
        SessionError: the weights are parked.

    """

    def preprocess_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if vars(self).get(_NOTE):
            raise SessionError(f"The engine does not serve: {PARKED}")
        return original(self, *args, **kwargs)

    return preprocess_add_request


def _models(worker: object) -> list[nn.Module]:
    """The worker's model, and its draft model if that is recorded."""
    model, *others = vllm_api.models_of(worker)
    return [model, *(other for other in others if record_of(other) is not None)]


def _rank(worker: object) -> int:
    return int(getattr(worker, "rank", 0))
