"""Tests that run in a process of their own, in which the simulated device is torch's accelerator."""

from __future__ import annotations

import atexit
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.gpu_methods.process import Worker
from tests.sim_device.device import SimDevice, missing_tools
from tests.sim_device.loading import load


def on_sim(initializer: Callable[[], None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test function that runs in the process with the device.

    The function's first argument is the device, counters at zero. It fails too if the host touched device
    memory. Parameters have to be picklable.

    Args:
        initializer: called once in the process, at its start; one process for each.

    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def test(**given: Any) -> None:
            if missing := missing_tools():
                pytest.skip(f"the simulated device cannot be compiled without {', '.join(missing)}")
            call = _worker(initializer)(_run, function.__module__, function.__qualname__, given)
            if (error := call.exception()) is not None:
                raise error

        functools.update_wrapper(test, function)
        test.__signature__ = _without_device(function)  # type: ignore[attr-defined]
        return test

    return decorate


def _without_device(function: Callable[..., None]) -> Any:
    import inspect

    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.cache
def _worker(initializer: Callable[[], None]) -> Worker:
    worker = Worker(initializer)
    atexit.register(worker.close)
    return worker


def start() -> None:
    """For tests that need nothing but torch."""
    import torch

    torch.set_num_threads(1)
    load()


def _run(module: str, name: str, given: dict[str, Any]) -> None:
    device: SimDevice = load()
    device.synchronize()
    device.traps()
    device.reset()
    function = getattr(importlib.import_module(module), name).__wrapped__
    try:
        function(device, **given)
    finally:
        device.synchronize()
    traps = device.traps()
    assert not traps, traps
