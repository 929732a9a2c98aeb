"""Recording a model while vLLM builds it and processes its weights for the first time."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import vllm_api

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
            from ..checkpoint.config import start_config
            from ..process.native_handles import watching_native
            from ..record.model_record import record_of
            from ..record.recorder import TailWatch, finish_record, look

            record = record_of(model) if isinstance(model, nn.Module) else None
            if record is None or record.complete:
                original(model, model_config, target_device)
                return
            loaded = look(record)
            with TailWatch(model, record) as watch, watching_native(target_device, record.handles):
                original(model, model_config, target_device)
            finish_record(record, loaded, watch.before_tail, model_config, target_device)
            record.start_stamps = _stamps(record.vllm_config, model_config)
            record.start_config = start_config(model_config)
            then()

        return process_weights_after_loading

    return wrap


def _stamps(vllm_config: Any, model_config: Any) -> dict[str, tuple[int, int, int]] | None:
    """Size, time and inode of the weight files this engine has just started from."""
    from ..checkpoint.io.stamps import stamp_of
    from ..errors import SourceError

    folder = Path(getattr(model_config, "model", ""))
    if not vllm_api.starts_from_files(vllm_config) or not folder.is_dir():
        return None
    try:
        return {str(file): stamp_of(str(file)) for file in sorted(folder.glob("*.safetensors"))}
    except SourceError:
        return None
