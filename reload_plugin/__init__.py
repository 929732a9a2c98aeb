"""Reload the weights of a running vLLM engine so that it equals a cold start on them, bit for bit.

Importing this package imports neither vLLM nor torch; names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import open_source
    from .errors import (
        DuplicateWeightsError,
        EngineBrokenError,
        ExportError,
        KernelFormatError,
        MisshapenWeightsError,
        MissingWeightsError,
        NonFiniteWeightsError,
        NotRecordedError,
        OffloadError,
        PartialUpdateError,
        ProcessingError,
        RanksDisagreeError,
        ReloadError,
        SessionError,
        SourceError,
        UnexpectedWeightsError,
        UnsupportedError,
        WeightsError,
        WorkerDiedError,
    )
    from .export.offloaded import save_offloaded
    from .export.served import export_checkpoint
    from .export.verify import verify
    from .offload.keep import KeepReport, dispatch, keep_weights_in_module
    from .offload.materialize import MaterializeReport, materialize, materialized
    from .offload.park import ParkReport, park, parked, unpark
    from .offload.reload_dispatched import reload_dispatched
    from .report import ExportReport, ReloadReport, VerifyReport
    from .tools.conversion import convert, is_stale, read_nested
    from .tools.fsdp import RestoreReport, restore_fsdp
    from .tools.nested import flatten, unflatten
    from .transaction.chunked_update import abort_weight_update, restore_for_reloading
    from .transaction.reload import record_for_reloading, reload_weights
    from .transaction.session import ReloadSession
    from .transaction.status import ReloadStatus, reload_engine, reload_engine_async, status, status_async

_HOME = {
    "DuplicateWeightsError": "errors",
    "EngineBrokenError": "errors",
    "ExportError": "errors",
    "ExportReport": "report",
    "KeepReport": "offload.keep",
    "KernelFormatError": "errors",
    "MaterializeReport": "offload.materialize",
    "MisshapenWeightsError": "errors",
    "MissingWeightsError": "errors",
    "NonFiniteWeightsError": "errors",
    "NotRecordedError": "errors",
    "OffloadError": "errors",
    "ParkReport": "offload.park",
    "PartialUpdateError": "errors",
    "ProcessingError": "errors",
    "RanksDisagreeError": "errors",
    "ReloadError": "errors",
    "ReloadReport": "report",
    "ReloadSession": "transaction.session",
    "ReloadStatus": "transaction.status",
    "RestoreReport": "tools.fsdp",
    "SessionError": "errors",
    "SourceError": "errors",
    "UnexpectedWeightsError": "errors",
    "UnsupportedError": "errors",
    "VerifyReport": "report",
    "WeightsError": "errors",
    "WorkerDiedError": "errors",
    "abort_weight_update": "transaction.chunked_update",
    "convert": "tools.conversion",
    "dispatch": "offload.keep",
    "export_checkpoint": "export.served",
    "flatten": "tools.nested",
    "is_stale": "tools.conversion",
    "keep_weights_in_module": "offload.keep",
    "materialize": "offload.materialize",
    "materialized": "offload.materialize",
    "open_source": "checkpoint",
    "park": "offload.park",
    "parked": "offload.park",
    "read_nested": "tools.conversion",
    "record_for_reloading": "transaction.reload",
    "reload_dispatched": "offload.reload_dispatched",
    "reload_engine": "transaction.status",
    "reload_engine_async": "transaction.status",
    "reload_weights": "transaction.reload",
    "restore_for_reloading": "transaction.chunked_update",
    "restore_fsdp": "tools.fsdp",
    "save_offloaded": "export.offloaded",
    "status": "transaction.status",
    "status_async": "transaction.status",
    "unflatten": "tools.nested",
    "unpark": "offload.park",
    "verify": "export.verify",
}

__all__ = [
    "DuplicateWeightsError",
    "EngineBrokenError",
    "ExportError",
    "ExportReport",
    "KeepReport",
    "KernelFormatError",
    "MaterializeReport",
    "MisshapenWeightsError",
    "MissingWeightsError",
    "NonFiniteWeightsError",
    "NotRecordedError",
    "OffloadError",
    "ParkReport",
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
    "VerifyReport",
    "WeightsError",
    "WorkerDiedError",
    "abort_weight_update",
    "convert",
    "dispatch",
    "export_checkpoint",
    "flatten",
    "is_stale",
    "keep_weights_in_module",
    "materialize",
    "materialized",
    "open_source",
    "park",
    "parked",
    "read_nested",
    "record_for_reloading",
    "reload_dispatched",
    "reload_engine",
    "reload_engine_async",
    "reload_weights",
    "restore_for_reloading",
    "restore_fsdp",
    "save_offloaded",
    "status",
    "status_async",
    "unflatten",
    "unpark",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
