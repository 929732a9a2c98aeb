"""What ``collective_rpc`` reaches in vLLM's worker to park its weights (see ``offload.park``), and a note of
that in the engine's core, which refuses requests meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import vllm_api
from ..export.answers import told
from ..offload.park import park_models, unpark_models, where_models_are
from ..record.model_record import record_of
from .patches import add_method, replace_method
from .requests import PARKED_NOTE


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


def noting_parked(original: Callable[..., Any]) -> Callable[..., Any]:
    """The engine core's ``collective_rpc``, by which its workers are told to park."""

    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        answers = original(self, method, *args, **kwargs)
        if method in ("park_weights", "unpark_weights"):
            states = {answer.get("state") for answer in answers if isinstance(answer, dict)}
            if method == "park_weights":
                vars(self)[PARKED_NOTE] = states == {"parked"}
            elif states == {"serving"}:
                vars(self)[PARKED_NOTE] = False
        return answers

    return collective_rpc


def _models(worker: object) -> list[nn.Module]:
    """The worker's model, and its draft model if that is recorded."""
    model, *others = vllm_api.models_of(worker)
    return [model, *(other for other in others if record_of(other) is not None)]


def _rank(worker: object) -> int:
    return int(getattr(worker, "rank", 0))
