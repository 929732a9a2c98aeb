"""A mechanism of sleeping for vLLM's worker over memory of the simulated device, and its worker."""

from __future__ import annotations

import types
from typing import Any
from unittest import mock

import torch
from torch import nn
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory
from vllm.v1.worker.gpu_worker import Worker

from tests.sim_device.loading import load

POOL = "weights"
"""vLLM's tag of the memory that the start of a model allocates."""


class SimBackend(SleepModeBackend):
    """Puts the pool of the weights on the simulated device to sleep: its memory traps, or is lost."""

    def suspend(self, level: int = 1) -> None:
        self._state = "SUSPENDED"
        load().sleep(POOL, discard=level >= 2)

    def resume(self, tags: list[str] | None = None) -> None:
        if tags is None or POOL in tags:
            load().wake(POOL)
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        if POOL in tags:
            load().sleep(POOL, discard=True)
        self._state = "SUSPENDED"


def register() -> None:
    """Offer the mechanism to vLLM, by its class name."""
    if "SimBackend" not in SleepModeBackendFactory._registry:
        SleepModeBackendFactory.register_backend("SimBackend", __name__, "SimBackend")


class Runner:
    """A model runner, as far as a worker asks one to sleep and to serve."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_model(self) -> nn.Module:
        return self.model


class SleepingWorker(Worker):
    """vLLM's own worker around a model that is there already.

    Args:
        model: recorded, its start over.
        backend: class name of its mechanism of sleeping.

    """

    def __init__(self, model: nn.Module, backend: str) -> None:
        config = types.SimpleNamespace(
            enable_nccl_comm_suspend=False, sleep_preserve_parameter_names=None, sleep_mode_backend=backend
        )
        self.vllm_config: Any = types.SimpleNamespace(model_config=config)
        self.model_config = config
        self.weight_transfer_engine = None
        self._sleep_mode_backend = None
        self._sleep_saved_parameters, self._sleep_saved_buffers = {}, {}
        self._sleep_saved_draft_buffers: dict[str, Any] = {}
        self.model_runner: Any = Runner(model)
        self.device = next(model.parameters()).device

    def sleep(self, level: int = 1) -> None:
        # The device gives no memory back, and vLLM compares what is free before and after.
        with mock.patch.object(torch.accelerator, "get_memory_info", return_value=(1, 2)):
            super().sleep(level)

    def get_draft_model(self) -> None:
        return None

    def synchronize_device(self) -> None:
        torch.accelerator.synchronize()
