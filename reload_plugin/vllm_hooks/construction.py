"""Recording a model while vLLM builds it and processes its weights for the first time."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import vllm_api
from . import live

_constructing: contextvars.ContextVar[bool] = contextvars.ContextVar("constructing", default=False)
"""Whether this thread is building a model: models inside of it are recorded with it."""


def recording_construction(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``initialize_model`` that records the load format of the outermost model it builds."""

    def initialize_model(*args: Any, **kwargs: Any) -> nn.Module:
        from ..record.construction_trace import ConstructionTrace
        from ..record.recorder import record_constructed

        if _constructing.get():
            return original(*args, **kwargs)
        trace = ConstructionTrace()
        token = _constructing.set(True)
        try:
            with trace:
                model = original(*args, **kwargs)
        finally:
            _constructing.reset(token)
        record_constructed(model, trace, kwargs.get("vllm_config", args[0] if args else None))
        return model

    return initialize_model


def recording_processing(then: Callable[[], None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``process_weights_after_loading`` that records what it does to a model, and calls ``then``."""

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        def process_weights_after_loading(
            model: nn.Module, model_config: Any, target_device: torch.device
        ) -> None:
            from ..checkpoint import start_stamps
            from ..checkpoint.config import start_config
            from ..process.native_handles import Handles, watching_native
            from ..ranks.collectives import CollectiveGate
            from ..record.model_record import record_of
            from ..record.recorder import TailWatch, finish_record, observe
            from ..record.write_watch import WriteWatch
            from ..transaction.engine_state import begin_state

            model = vllm_api.unwrapped(model)
            record = record_of(model) if isinstance(model, nn.Module) else None
            if record is None:
                original(model, model_config, target_device)
                return
            if record.complete:
                live.processed_again(original, model, model_config, target_device)
                return
            loaded = observe(record)
            handles: Handles = {}
            writes = WriteWatch(record)
            watch = TailWatch(model, record, writes)
            gate = CollectiveGate()
            with watch, watching_native(target_device, handles), writes, gate.around(""):
                original(model, model_config, target_device)
            writes.keep_if_rebound()
            record = finish_record(
                model, record, loaded, watch.before_tail, model_config, target_device, writes
            )
            state = begin_state(model, record, handles)
            state.enters_collectives = gate.entered
            state.start.stamps = start_stamps(record.vllm_config, model_config, model)
            state.start.config = start_config(model_config)
            state.start.remember_listing(model, record)
            live.guard(model)
            then()

        return process_weights_after_loading

    return wrap
