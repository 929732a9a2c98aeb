"""Load format to kernel format: vLLM's own processing, run on one group of layers at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import _vllm
from .errors import ProcessingError, ReloadError
from .record import ModelRecord
from .staging import Stage

ProcessWeights = Callable[..., None]
"""vLLM's ``process_weights_after_loading(model, model_config, target_device)``, unpatched."""


@contextlib.contextmanager
def watching_native(device: torch.device | None) -> Iterator[list[torch.Tensor]]:
    """Notes the memory that native handles point into: what their constructors were given.

    oneDNN's int8 handler keeps the address of the weight scales it was made with, so that memory has
    to live as long as the handler does. The constructors themselves are wrapped for the time: a
    dispatch mode does not see them (they are composite), and a function mode breaks the
    ``torch.compile`` that some methods use while processing.
    """
    captured: list[torch.Tensor] = []

    def wrap(constructor: Callable[..., Any], positions: tuple[int, ...] | None) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if positions is not None and not kwargs:
                given = tuple(args[position] for position in positions)
            captured.extend(value.detach() for value in given if isinstance(value, torch.Tensor))
            return constructor(*args, **kwargs)

        return noting

    replaced = []
    try:
        if device is not None and device.type == "cpu":
            for library, name, positions in _vllm.native_constructors():
                constructor = getattr(library, name)
                setattr(library, name, wrap(constructor, positions))
                replaced.append((library, name, constructor))
        yield captured
    finally:
        for library, name, constructor in replaced:
            setattr(library, name, constructor)


def process_stage(stage: Stage, record: ModelRecord, original: ProcessWeights) -> None:
    """Process a loaded group; afterwards its layers are in kernel format with the new values.

    Layers of online methods are first processed the way they are while a cold start streams the
    weights in, and then once more with everything else, as a cold start does.
    """
    stage.materialise()
    try:
        effect = any(layer.effect for layer in stage.group.layers)
        with watching_native(record.target_device if effect else None) as captured:
            for layer in stage.group.layers:
                module = layer.ref()
                if module is not None and layer.online:
                    _vllm.process_online(module)
            _vllm.process_layers(original, stage.layers, record.model_config, record.target_device)
    except ReloadError:
        raise
    except Exception as error:
        raise ProcessingError(
            f"Processing {stage.group.name or 'the model'} raised {type(error).__name__}: {error}. "
            "The engine serves what it served before."
        ) from error
    stage.captured = captured
    stage.processed = True


def process_tail(model: nn.Module, record: ModelRecord, original: ProcessWeights) -> None:
    """The end of vLLM's processing that concerns the model as a whole: its own hook, if it has one.

    Every layer must show its new values while this runs.
    """
    try:
        _vllm.process_layers(original, [], record.model_config, record.target_device, model)
    except ReloadError:
        raise
    except Exception as error:
        raise ProcessingError(
            f"{type(model).__name__}.process_weights_after_loading raised {type(error).__name__}: {error}. "
            "The engine serves what it served before."
        ) from error
