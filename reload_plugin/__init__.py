"""Reload the weights of a running vLLM engine so that it equals a cold start on them, bit for bit.

Importing this package imports neither vLLM nor torch; names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        DuplicateWeightsError,
        EngineBrokenError,
        KernelFormatError,
        MisshapenWeightsError,
        MissingWeightsError,
        NotRecordedError,
        ProcessingError,
        ReloadError,
        SessionError,
        SourceError,
        UnexpectedWeightsError,
        UnsupportedError,
        WeightsError,
    )
    from .reload import record_for_reloading, reload_weights, restore_for_reloading
    from .session import ReloadSession
    from .verify import ReloadReport

_HOME = {
    "DuplicateWeightsError": "errors",
    "EngineBrokenError": "errors",
    "KernelFormatError": "errors",
    "MisshapenWeightsError": "errors",
    "MissingWeightsError": "errors",
    "NotRecordedError": "errors",
    "ProcessingError": "errors",
    "ReloadError": "errors",
    "ReloadReport": "verify",
    "ReloadSession": "session",
    "SessionError": "errors",
    "SourceError": "errors",
    "UnexpectedWeightsError": "errors",
    "UnsupportedError": "errors",
    "WeightsError": "errors",
    "record_for_reloading": "reload",
    "reload_weights": "reload",
    "restore_for_reloading": "reload",
}

__all__ = [
    "DuplicateWeightsError",
    "EngineBrokenError",
    "KernelFormatError",
    "MisshapenWeightsError",
    "MissingWeightsError",
    "NotRecordedError",
    "ProcessingError",
    "ReloadError",
    "ReloadReport",
    "ReloadSession",
    "SessionError",
    "SourceError",
    "UnexpectedWeightsError",
    "UnsupportedError",
    "WeightsError",
    "record_for_reloading",
    "reload_weights",
    "restore_for_reloading",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
