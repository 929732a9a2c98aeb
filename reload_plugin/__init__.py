"""Reload the weights of a running vLLM engine so that it equals a cold start on them, bit for bit.

Importing this package imports neither vLLM nor torch; names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import convert, is_stale, read_nested
    from .errors import (
        DuplicateWeightsError,
        EngineBrokenError,
        KernelFormatError,
        MisshapenWeightsError,
        MissingWeightsError,
        NonFiniteWeightsError,
        NotRecordedError,
        PartialUpdateError,
        ProcessingError,
        RanksDisagreeError,
        ReloadError,
        SessionError,
        SourceError,
        UnexpectedWeightsError,
        UnsupportedError,
        WeightsError,
    )
    from .fsdp import RestoreReport, restore_fsdp
    from .monitor import ReloadStatus, reload_engine, status
    from .nested import flatten, unflatten
    from .reload import record_for_reloading, reload_weights
    from .session import ReloadSession
    from .sources import open_source
    from .verify import ReloadReport
    from .weight_update import abort_weight_update, restore_for_reloading

_HOME = {
    "DuplicateWeightsError": "errors",
    "EngineBrokenError": "errors",
    "KernelFormatError": "errors",
    "MisshapenWeightsError": "errors",
    "MissingWeightsError": "errors",
    "NonFiniteWeightsError": "errors",
    "NotRecordedError": "errors",
    "PartialUpdateError": "errors",
    "ProcessingError": "errors",
    "RanksDisagreeError": "errors",
    "ReloadError": "errors",
    "ReloadReport": "verify",
    "ReloadSession": "session",
    "ReloadStatus": "monitor",
    "RestoreReport": "fsdp",
    "SessionError": "errors",
    "SourceError": "errors",
    "UnexpectedWeightsError": "errors",
    "UnsupportedError": "errors",
    "WeightsError": "errors",
    "abort_weight_update": "weight_update",
    "convert": "conversion",
    "flatten": "nested",
    "is_stale": "conversion",
    "open_source": "sources",
    "read_nested": "conversion",
    "record_for_reloading": "reload",
    "reload_engine": "monitor",
    "reload_weights": "reload",
    "restore_for_reloading": "weight_update",
    "restore_fsdp": "fsdp",
    "status": "monitor",
    "unflatten": "nested",
}

__all__ = [
    "DuplicateWeightsError",
    "EngineBrokenError",
    "KernelFormatError",
    "MisshapenWeightsError",
    "MissingWeightsError",
    "NonFiniteWeightsError",
    "NotRecordedError",
    "PartialUpdateError",
    "ProcessingError",
    "RanksDisagreeError",
    "ReloadError",
    "ReloadReport",
    "ReloadSession",
    "ReloadStatus",
    "RestoreReport",
    "SessionError",
    "SourceError",
    "UnexpectedWeightsError",
    "UnsupportedError",
    "WeightsError",
    "abort_weight_update",
    "convert",
    "flatten",
    "is_stale",
    "open_source",
    "read_nested",
    "record_for_reloading",
    "reload_engine",
    "reload_weights",
    "restore_for_reloading",
    "restore_fsdp",
    "status",
    "unflatten",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
