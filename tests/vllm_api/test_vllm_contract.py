"""What this package leans on in vLLM, symbol by symbol, so that a move upstream is named here first."""

import importlib
import inspect
import logging
import os
import subprocess
import sys

import pytest

from reload_plugin import vllm_api
from reload_plugin.vllm_hooks import plugin


@pytest.mark.parametrize(("module", "name"), vllm_api.SEAMS, ids=lambda part: part)
def test_seam_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_no_seam_is_missing() -> None:
    assert vllm_api.missing_seams() == []


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        (vllm_api.LOADER_UTILS, "process_weights_after_loading", ["model", "model_config", "target_device"]),
        (vllm_api.LAYERWISE, "initialize_layerwise_reload", ["model"]),
        (
            vllm_api.INPLACE,
            "reload_weights",
            ["vllm_config", "model", "weights_iterator", "weights_path", "is_checkpoint_format"],
        ),
    ],
)
def test_patched_functions_have_the_parameters_we_answer_to(
    module: str, name: str, parameters: list[str]
) -> None:
    original = inspect.unwrap(getattr(importlib.import_module(module), name))
    assert list(inspect.signature(original).parameters) == parameters


def test_processing_asks_a_model_for_its_layers_only() -> None:
    """The view we hand to vLLM's own processing offers `named_modules` and the hook, and no more."""
    original = inspect.unwrap(vllm_api.get(vllm_api.LOADER_UTILS, "process_weights_after_loading"))
    used = {
        line.split("model.")[1].split("(")[0]
        for line in inspect.getsource(original).splitlines()
        if " model." in line and not line.strip().startswith("#") and "vllm." not in line
    }
    assert used <= {"named_modules", "process_weights_after_loading"}


@pytest.mark.parametrize(("module", "cls"), vllm_api.RUNNERS)
def test_runners_take_what_we_translate(module: str, cls: str) -> None:
    runner = getattr(importlib.import_module(module), cls)
    parameters = inspect.signature(inspect.unwrap(runner.reload_weights)).parameters
    assert list(parameters) == ["self", "weights_iterator", "weights_path", "is_checkpoint_format"]


def test_an_executor_asks_the_ranks_and_reads_their_answers_as_we_expect() -> None:
    executor, worker = vllm_api.get(*vllm_api.EXECUTOR), vllm_api.get(*vllm_api.WORKER_PROCESS)
    asks = inspect.unwrap(executor.collective_rpc)
    wanted = {"unique_reply_rank", "kv_output_aggregator", "ec_output_aggregator"}
    assert wanted <= inspect.signature(asks).parameters.keys()
    assert "self.response_mqs" in inspect.getsource(asks)
    assert ".dequeue(timeout=" in inspect.getsource(asks)
    called = inspect.unwrap(worker._execute_worker_rpc)
    assert list(inspect.signature(called).parameters) == ["self", "rpc_request"]


def test_register_replaces_every_binding_and_unregister_puts_all_back() -> None:
    from vllm.model_executor.model_loader import base_loader, utils

    plugin.unregister()
    plain = utils.process_weights_after_loading
    try:
        plugin.register()
        assert utils.process_weights_after_loading is base_loader.process_weights_after_loading is not plain
        plugin.register()
        assert len(plugin.patched()) == len(set(plugin.patched()))
        plugin.unregister()
        assert utils.process_weights_after_loading is base_loader.process_weights_after_loading is plain
        assert plugin.patched() == []
    finally:
        plugin.register()


class Lines(logging.Handler):
    """Keeps the messages of a logger; vLLM configures its loggers not to propagate."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_an_unsupported_vllm_is_left_alone_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.unregister()
    monkeypatch.setattr(vllm_api, "version", lambda: "0.99.0")
    lines = Lines()
    plugin.logger.addHandler(lines)
    monkeypatch.setattr(plugin.logger, "level", logging.INFO)
    plugin.logger.manager._clear_cache()
    try:
        plugin.register()
        assert plugin.patched() == []
        assert len(lines.lines) == 1
        assert "0.99.0" in lines.lines[0]
    finally:
        plugin.logger.removeHandler(lines)
        monkeypatch.undo()
        plugin.logger.manager._clear_cache()
        plugin.register()


def test_the_off_switch_leaves_vllm_alone() -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from reload_plugin.vllm_hooks import plugin; print('patched', plugin.patched())"
    )
    environment = {**os.environ, "RELOAD_PLUGIN": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "patched []" in out.stdout


PREFLIGHT = (
    ("vllm.engine.arg_utils", "EngineArgs"),
    ("vllm.distributed", "init_distributed_environment"),
    ("vllm.distributed", "initialize_model_parallel"),
    ("vllm.distributed", "destroy_model_parallel"),
    ("vllm.distributed", "destroy_distributed_environment"),
    ("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT"),
)
"""What a model is made from without an engine; reloads do without them, so they are no seams."""


@pytest.mark.parametrize(("module", "name"), PREFLIGHT, ids=lambda part: part)
def test_what_the_preflight_without_an_engine_needs_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)
