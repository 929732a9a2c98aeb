"""What ``collective_rpc`` reaches in vLLM's worker to park its weights; see ``offload.park``."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import vllm_api
from ..export.answers import told
from ..offload.park import park_models, unpark_models, where_models_are
from ..record.model_record import record_of
from .patches import add_method


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


def _models(worker: object) -> list[nn.Module]:
    """The worker's model, and its draft model if that is recorded."""
    model, *others = vllm_api.models_of(worker)
    return [model, *(other for other in others if record_of(other) is not None)]


def _rank(worker: object) -> int:
    return int(getattr(worker, "rank", 0))
