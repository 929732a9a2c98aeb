"""Patching vLLM. ``register`` is the entry point; ``unregister`` undoes it."""

from __future__ import annotations

import logging
import os
import sys

from .. import vllm_api
from .patches import patched, replace_function, replace_method, undo_all

__all__ = ["OFF_SWITCH", "patched", "register", "unregister"]

logger = logging.getLogger("vllm.reload_plugin")

OFF_SWITCH = "RELOAD_PLUGIN"
"""Environment variable: ``0`` leaves vLLM as it was."""


def register() -> None:
    """Take over vLLM's reload in this process. Harmless when called again.

    Leaves vLLM untouched, with one log line, when ``RELOAD_PLUGIN=0`` is set, when the version is
    not supported, or when a seam that this package leans on is missing.
    """
    if patched():
        return
    if os.environ.get(OFF_SWITCH) == "0":
        logger.info("reload_plugin is switched off by %s=0; vLLM's own reload stays in place.", OFF_SWITCH)
        return
    version = vllm_api.version()
    if version is None or not version.startswith(vllm_api.SUPPORTED):
        logger.warning(
            "reload_plugin supports vLLM %s and found %s; vLLM's own reload stays in place.",
            ", ".join(f"{prefix}x" for prefix in vllm_api.SUPPORTED),
            version,
        )
        return
    if missing := vllm_api.missing_seams():
        logger.warning(
            "reload_plugin does not find %s in vLLM %s; vLLM's own reload stays in place.",
            ", ".join(missing),
            version,
        )
        return
    _patch_all()
    _offer_transfer_engine()
    logger.info("reload_plugin takes over weight reloading in vLLM %s.", version)


def unregister() -> None:
    """Put back everything that ``register`` replaced."""
    from ..transaction.vllm_processing import use_process_weights
    from .transfer_engine import withdraw

    if patched():
        withdraw()
    undo_all()
    use_process_weights(None)


def _patch_all() -> None:
    from ..transaction.vllm_processing import use_process_weights
    from . import construction, executors, layerwise, live, runners

    use_process_weights(vllm_api.get(vllm_api.LOADER_UTILS, "process_weights_after_loading"))
    processing = construction.recording_processing(then=_patch_workers)
    replace_function(vllm_api.LOADER_UTILS, "initialize_model", construction.recording_construction)
    replace_function(vllm_api.LOADER_UTILS, "process_weights_after_loading", processing)
    replace_function(vllm_api.INPLACE, "reload_weights", runners.reloading)
    replace_function(vllm_api.LAYERWISE, "initialize_layerwise_reload", layerwise.opening)
    for name in ("finalize_layerwise_reload", "finalize_layerwise_processing"):
        replace_function(vllm_api.LAYERWISE, name, layerwise.finishing)
    replace_method(*vllm_api.EXECUTOR, "collective_rpc", executors.reading_own_answers)
    replace_method(*vllm_api.WORKER_PROCESS, "_execute_worker_rpc", executors.counting_calls)
    replace_method(*vllm_api.WORKER_PROCESS, "handle_output", live.hearing_answers)
    replace_function(*vllm_api.RUN_METHOD, live.hearing)


def _patch_workers() -> None:
    """Patch the runners and the worker of this process, now that vLLM has imported them."""
    from . import runners, workers

    for module, cls in vllm_api.RUNNERS:
        replace_method(module, cls, "reload_weights", runners.runner_reloading)
    module, cls = vllm_api.WORKER
    replace_method(module, cls, "execute_model", workers.guarding)
    replace_method(module, cls, "update_weights", workers.ending)
    replace_method(module, cls, "finish_weight_update", workers.finishing)
    replace_method(module, cls, "reset_weights", workers.resetting)
    replace_method(module, cls, "sleep", workers.sleeping)
    replace_method(module, cls, "wake_up", workers.waking)
    replace_method(module, cls, "discard", workers.discarding)
    worker = getattr(sys.modules.get(module), cls, None)
    if worker is not None:
        workers.add_worker_calls(worker)


def _offer_transfer_engine() -> None:
    """Chunked updates from files, for whoever configures them; everything else works without."""
    from .transfer_engine import BACKEND, offer

    if reason := offer():
        logger.warning("reload_plugin offers no weight-transfer engine %r: %s.", BACKEND, reason)
