"""A mechanism of sleeping for vLLM's worker on a CPU, and the worker that uses it.

Not for the process of the simulated device: to import vLLM's worker on a CPU replaces ``torch.Event``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from reload_plugin.record.module_state import holders_of
from reload_plugin.record.snapshot import read
from reload_plugin.tensors import storage_id

POOL = "weights"
"""vLLM's tag of the memory that the start of a model allocates."""


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
        if "HostBackend" not in SleepModeBackendFactory._registry:
            SleepModeBackendFactory.register_backend("HostBackend", __name__, "HostBackend")
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
