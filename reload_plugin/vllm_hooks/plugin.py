"""Patching vLLM. ``register`` is the entry point; ``unregister`` undoes it."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import vllm_api
from .patches import patched, replace_function, replace_method, replace_method_of_all, undo_all

if TYPE_CHECKING:
    from .ranges import Hooks

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
    if reason := vllm_api.why_unsupported(version):
        logger.warning("%s; vLLM's own reload stays in place.", reason)
        return
    if missing := vllm_api.missing_seams():
        logger.warning(
            "reload_plugin does not find %s in vLLM %s; vLLM's own reload stays in place.",
            ", ".join(missing),
            version,
        )
        return
    from .ranges import hooks_for

    minor = vllm_api.minor_of(version)
    vllm_api.choose(minor)
    _patch_all(hooks_for(minor))
    _offer_transfer_engine()
    if vllm_api.is_untested(version):
        logger.warning(
            "reload_plugin takes over weight reloading in vLLM %s, with which it was not tested (it was with "
            "%s); %s=1 would leave it alone.",
            version,
            vllm_api.supported_range(),
            vllm_api.STRICT,
        )
    else:
        logger.info("reload_plugin takes over weight reloading in vLLM %s.", version)


def unregister() -> None:
    """Put back everything that ``register`` replaced."""
    from ..transaction.vllm_processing import use_process_weights
    from .transfer_engine import withdraw

    if patched():
        withdraw()
    undo_all()
    use_process_weights(None)


def _patch_all(hooks: Hooks) -> None:
    from ..transaction.vllm_processing import use_process_weights
    from . import answers, construction, layerwise, live, replicas, requests

    use_process_weights(vllm_api.get(vllm_api.LOADER_UTILS, "process_weights_after_loading"))
    processing = construction.recording_processing(then=functools.partial(_patch_workers, hooks))
    replace_function(vllm_api.LOADER_UTILS, "initialize_model", construction.recording_construction)
    replace_function(vllm_api.LOADER_UTILS, "process_weights_after_loading", processing)
    hooks.patch_reload()
    replace_function(vllm_api.LAYERWISE, "initialize_layerwise_reload", layerwise.opening)
    for name in ("finalize_layerwise_reload", "finalize_layerwise_processing"):
        replace_function(vllm_api.LAYERWISE, name, layerwise.finishing)
    replace_method(*vllm_api.EXECUTOR, "collective_rpc", answers.reading_own_answers)
    hooks.patch_worker_process()
    replace_method_of_all(*vllm_api.WORKER_PROCESS, "handle_output", _answering)
    replace_function(*vllm_api.RUN_METHOD, live.hearing)
    # Processes that are forked from this one do not register again, so these are imported now to be patched.
    vllm_api.get(*vllm_api.REPLICAS)
    vllm_api.get(*vllm_api.ENGINE_CORE)
    replace_method(*vllm_api.REPLICAS, "collective_rpc_async", replicas.reaching_all_replicas)
    requests.patch_engine()


def _answering(original: Callable[..., Any]) -> Callable[..., Any]:
    from . import executors, live

    return executors.telling_other_ranks(live.hearing_answers(original))


def _patch_workers(hooks: Hooks) -> None:
    """Patch the runners and the worker of this process, now that vLLM has imported them."""
    from . import parking, requests, workers

    hooks.patch_runners()
    requests.patch_engine()
    module, cls = vllm_api.WORKER
    replace_method(module, cls, "execute_model", workers.guarding)
    replace_method(module, cls, "update_weights", workers.ending)
    replace_method(module, cls, "finish_weight_update", workers.finishing)
    replace_method(module, cls, "reset_weights", workers.resetting)
    replace_method(module, cls, "sleep", workers.sleeping)
    replace_method(module, cls, "wake_up", workers.waking)
    replace_method(module, cls, "discard", workers.discarding)
    replace_method(*vllm_api.EXPERT_BALANCER, "add_model", _noting_balancer)
    worker = getattr(sys.modules.get(module), cls, None)
    if worker is not None:
        workers.add_worker_calls(worker)
        parking.add_parking_calls(worker)


def _noting_balancer(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EplbState.add_model``: whether it moves experts is asked before a reload."""

    def add_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_api.note_balancer(self)
        return original(self, *args, **kwargs)

    return add_model


def _offer_transfer_engine() -> None:
    """Chunked updates from files, for whoever configures them; everything else works without."""
    from .transfer_engine import BACKEND, offer

    if reason := offer():
        logger.warning("reload_plugin offers no weight-transfer engine %r: %s.", BACKEND, reason)
