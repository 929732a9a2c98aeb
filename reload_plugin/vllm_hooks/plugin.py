"""Patching vLLM: the only module that does. ``register`` is the entry point; ``unregister`` undoes it."""

from __future__ import annotations

import contextvars
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import vllm_api

logger = logging.getLogger("vllm.reload_plugin")

OFF_SWITCH = "RELOAD_PLUGIN"
"""Environment variable: ``0`` leaves vLLM as it was."""

_patches: list[tuple[Any, str, object]] = []
"""(module or class, name, what was there before)"""
_additions: list[tuple[type, str]] = []
"""(class, name) of methods that were not there before"""
_constructing = 0


def register() -> None:
    """Take over vLLM's reload in this process. Harmless when called again.

    Leaves vLLM untouched, with one log line, when ``RELOAD_PLUGIN=0`` is set, when the version is
    not supported, or when a seam that this package leans on is missing.
    """
    if _patches:
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

    if _patches:
        withdraw()
    for module, name, original in reversed(_patches):
        setattr(module, name, original)
    for owner, name in _additions:
        delattr(owner, name)
    _patches.clear()
    _additions.clear()
    use_process_weights(None)


def patched() -> list[str]:
    """What is patched now, as ``module.name``."""
    return [f"{module.__name__}.{name}" for module, name, _ in _patches]


def _patch_all() -> None:
    from ..ranks.votes import counting, reading_own_answers
    from ..transaction.vllm_processing import use_process_weights

    process = vllm_api.get(vllm_api.LOADER_UTILS, "process_weights_after_loading")
    use_process_weights(process)
    _replace(vllm_api.LOADER_UTILS, "initialize_model", _recording_construction)
    _replace(vllm_api.LOADER_UTILS, "process_weights_after_loading", _recording_processing)
    _replace(vllm_api.INPLACE, "reload_weights", _reloading)
    _replace(vllm_api.LAYERWISE, "initialize_layerwise_reload", _opening)
    _replace(vllm_api.LAYERWISE, "finalize_layerwise_reload", _finishing)
    _replace_method(*vllm_api.EXECUTOR, "collective_rpc", reading_own_answers)
    _replace_method(*vllm_api.WORKER_PROCESS, "_execute_worker_rpc", counting)


def _offer_transfer_engine() -> None:
    """Chunked updates from files, for whoever configures them; everything else works without."""
    from .transfer_engine import BACKEND, offer

    if reason := offer():
        logger.warning("reload_plugin offers no weight-transfer engine %r: %s.", BACKEND, reason)


def _replace(module: str, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function in its module and wherever vLLM bound it by name."""
    original = vllm_api.get(module, name)
    replacement = functools.wraps(original)(wrap(original))
    for binder, attribute in list(vllm_api.binders_of(original)):
        setattr(binder, attribute, replacement)
        _patches.append((binder, attribute, original))


def _recording_construction(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``initialize_model`` that records the load format of the outermost model it builds."""

    def initialize_model(*args: Any, **kwargs: Any) -> nn.Module:
        global _constructing
        from ..record.construction_trace import ConstructionTrace
        from ..record.recorder import record_constructed

        if _constructing:
            return original(*args, **kwargs)
        trace = ConstructionTrace()
        _constructing += 1
        try:
            with trace:
                model = original(*args, **kwargs)
        finally:
            _constructing -= 1
        record_constructed(model, trace, kwargs.get("vllm_config", args[0] if args else None))
        return model

    return initialize_model


def _recording_processing(original: Callable[..., None]) -> Callable[..., None]:
    """``process_weights_after_loading`` that records what it does to the model."""

    def process_weights_after_loading(
        model: nn.Module, model_config: Any, target_device: torch.device
    ) -> None:
        from ..checkpoint import start_stamps
        from ..checkpoint.config import start_config
        from ..process.native_handles import watching_native
        from ..record.model_record import record_of
        from ..record.recorder import TailWatch, finish_record, observe
        from ..transaction.engine_state import begin_state

        record = record_of(model) if isinstance(model, nn.Module) else None
        if record is None or record.complete:
            original(model, model_config, target_device)
            return
        loaded = observe(record)
        handles: dict[int, bytes | None] = {}
        with TailWatch(model, record) as watch, watching_native(target_device, handles):
            original(model, model_config, target_device)
        record = finish_record(model, record, loaded, watch.before_tail, model_config, target_device)
        state = begin_state(model, record, handles)
        state.start.stamps = start_stamps(record.vllm_config, model_config, model)
        state.start.config = start_config(model_config)
        _patch_workers()

    return process_weights_after_loading


def _patch_workers() -> None:
    """Patch the runners and the worker of this process, now that vLLM has imported them."""
    for module, cls in vllm_api.RUNNERS:
        _replace_method(module, cls, "reload_weights", _runner_reloading)
    module, cls = vllm_api.WORKER
    _replace_method(module, cls, "execute_model", _guarding)
    _replace_method(module, cls, "update_weights", _ending)
    worker = getattr(sys.modules.get(module), cls, None)
    if worker is not None:
        _add_worker_calls(worker)


def _replace_method(module: str, cls: str, name: str, wrap: Callable[..., Any]) -> None:
    owner = getattr(sys.modules.get(module), cls, None)
    if owner is None or any(where is owner and what == name for where, what, _ in _patches):
        return
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrap(original)))
    _patches.append((owner, name, original))


_asked: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("options", default=None)
"""Options of ours on their way through a runner's ``reload_weights``, which does not know them."""


def _runner_reloading(original: Callable[..., Any]) -> Callable[..., Any]:
    """A runner's ``reload_weights`` that takes our options and the older name of ``is_checkpoint_format``."""
    from ..options import OPTION_NAMES
    from ..record.model_record import record_of
    from ..transaction.caches import EMPTIED_BY_RUNNER
    from ..transaction.engine_state import state_of

    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "process_weights_after_loading" in kwargs:
            kwargs["is_checkpoint_format"] = kwargs.pop("process_weights_after_loading")
        token = _asked.set({name: kwargs.pop(name) for name in OPTION_NAMES & kwargs.keys()})
        try:
            returned = original(self, *args, **kwargs)
        finally:
            _asked.reset(token)
        if record_of(self.get_model()) is not None:
            state_of(self.get_model()).outcome.note_caches(EMPTIED_BY_RUNNER)
        return returned

    return reload_weights


def _add_worker_calls(worker: type) -> None:
    """What ``collective_rpc`` reaches by name: the state of a worker's model, what became of the engine's
    caches, and the end of an update.
    """
    from ..transaction.engine_state import state_of
    from ..transaction.status import status_of

    def reload_status(self: Any, digest: bool = True) -> dict[str, Any]:
        """The state of this worker's model, as JSON; see ``monitor.ReloadStatus``."""
        answer = status_of(self.model_runner.get_model(), digest, int(getattr(self, "rank", 0)))
        return answer.model_dump(mode="json")

    def note_reset_caches(self: Any, outcomes: dict[str, str]) -> None:
        """Put into the last report what became of caches (by name) that only the engine can reset."""
        state_of(self.model_runner.get_model()).outcome.note_caches(outcomes)

    def abort_weight_update(self: Any) -> bool:
        """End the open weight update; says whether one was open."""
        engine = getattr(self, "weight_transfer_engine", None)
        if engine is not None:
            engine.reset_weight_update_target()
        self._weight_update_active = False
        return state_of(self.model_runner.get_model()).abandon_update()

    for function in (reload_status, note_reset_caches, abort_weight_update):
        name = function.__name__
        if not hasattr(worker, name):
            setattr(worker, name, function)
            _additions.append((worker, name))


def _ending(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``update_weights``: a chunk that fails ends the update, whoever raised it."""
    from ..transaction.engine_state import state_of

    def update_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            state_of(self.model_runner.get_model()).abandon_update()
            raise

    return update_weights


def _guarding(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's forward pass, which never runs on half-loaded weights."""
    from ..transaction.engine_state import state_of

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        state_of(self.model_runner.get_model()).before_forward_pass()
        return original(self, *args, **kwargs)

    return execute_model


def _reloading(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's ``reload_weights`` for its model runners; models without a record keep vLLM's own."""

    def reload_weights(
        vllm_config: Any,
        model: nn.Module,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None,
        weights_path: str | None,
        is_checkpoint_format: bool,
    ) -> None:
        from ..record.model_record import record_of
        from ..transaction.reload import reload_weights as ours

        if record_of(model) is None:
            logger.warning("%s was built before reload_plugin; vLLM's own reload runs.", type(model).__name__)
            original(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)
            return
        how = {"digest": "later"} | (_asked.get() or {})  # nobody gets the report
        report = ours(model, weights_iterator, weights_path, is_checkpoint_format, **how)
        logger.info("Reloaded: %s", report.model_dump_json(exclude={"ignored", "kept"}))

    return reload_weights


def _opening(original: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    def initialize_layerwise_reload(model: nn.Module) -> None:
        from ..record.model_record import record_of
        from ..transaction.chunked_update import open_layerwise

        if record_of(model) is None:
            original(model)
        else:
            open_layerwise(model)

    return initialize_layerwise_reload


def _finishing(original: Callable[..., None]) -> Callable[..., None]:
    def finalize_layerwise_reload(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        from ..record.model_record import record_of
        from ..transaction.chunked_update import finish_layerwise

        if record_of(model) is None:
            original(model, *args, **kwargs)
        else:
            finish_layerwise(model)

    return finalize_layerwise_reload
