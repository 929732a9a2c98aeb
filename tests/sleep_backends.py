"""Mechanisms of sleeping for vLLM's worker that spoil discarded memory, and workers that use them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from reload_plugin.record.module_state import holders_of
from reload_plugin.record.snapshot import read
from reload_plugin.tensors import storage_id
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
    """Offer the mechanisms to vLLM, by their class names."""
    for name in ("SimBackend", "HostBackend"):
        if name not in SleepModeBackendFactory._registry:
            SleepModeBackendFactory.register_backend(name, __name__, name)


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


class HostBackend(SleepModeBackend):
    """Spoils host memory while it is away; with level 2 and with discard for good."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[torch.UntypedStorage] = []
        """What the start of a model allocated."""
        self._kept: list[torch.Tensor] | None = None

    def suspend(self, level: int = 1) -> None:
        self._state = "SUSPENDED"
        self._kept = [_bytes_of(storage).clone() for storage in self.memory] if level == 1 else None
        self._spoil()

    def resume(self, tags: list[str] | None = None) -> None:
        if self._kept is not None and (tags is None or POOL in tags):
            for storage, values in zip(self.memory, self._kept, strict=True):
                _bytes_of(storage).copy_(values)
            self._kept = None
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        if POOL in tags:
            self._spoil()
        self._state = "SUSPENDED"

    def _spoil(self) -> None:
        for storage in self.memory:
            _bytes_of(storage).fill_(0xFF)  # NaN in every floating-point type, -1 in integers


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class SleepingCpuWorker(CPUWorker):
    """vLLM's worker on a CPU with the sleep of its worker on a GPU, over ``HostBackend``."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        register()
        self.model_config.sleep_mode_backend = "HostBackend"
        model = self.get_model()
        holders = [holder for module in model.modules() for _, holder in holders_of(module)]
        values = [value for holder in holders for value in read(holder).values()]
        found = {
            key: value.untyped_storage()
            for value in values
            if isinstance(value, torch.Tensor) and (key := storage_id(value)) is not None
        }
        self.sleep_mode_backend.memory = list(found.values())

    def sleep(self, level: int = 1) -> None:
        with _as_if_there_were_an_accelerator():
            Worker.sleep(self, level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        Worker.wake_up(self, tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        Worker.discard(self, tags)


@contextlib.contextmanager
def _as_if_there_were_an_accelerator() -> Iterator[None]:
    with (
        mock.patch.object(torch.accelerator, "synchronize", return_value=None),
        mock.patch.object(torch.accelerator, "get_memory_info", return_value=(1, 2)),
    ):
        yield
