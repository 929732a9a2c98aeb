"""What this package leans on in vLLM, symbol by symbol, so that a move upstream is named here first."""

import importlib
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from reload_plugin import vllm_api
from reload_plugin.vllm_api import ranges, seams
from reload_plugin.vllm_hooks import plugin
from reload_plugin.vllm_hooks.ranges import hooks_for

MINOR = vllm_api.minor_of(vllm_api.version())
SEAMS = vllm_api.seams_of(MINOR)


def has_reload_function() -> bool:
    """Whether vLLM's runners share one function that reloads; else the V1 runner's method is what does."""
    return any(seam.module == vllm_api.INPLACE for seam in SEAMS)


@pytest.mark.parametrize("seam", SEAMS, ids=str)
def test_seam_is_there(seam: vllm_api.Seam) -> None:
    """Also those in modules of workers, by an import."""
    found = importlib.import_module(seam.module)
    for part in seam.name.split("."):
        found = getattr(found, part)


def test_no_seam_is_missing() -> None:
    assert vllm_api.missing_seams() == []


def test_seams_of_newer_versions_are_not_there() -> None:
    """Else the table says less than it could."""
    newer = [seam for seam in vllm_api.SEAMS if seam.since > MINOR]
    assert [str(seam) for seam in newer if seam.is_there()] == []


def test_modules_of_workers_are_not_imported_to_look_for_seams() -> None:
    code = (
        "import sys; from reload_plugin import vllm_api; print('missing', vllm_api.missing_seams(),"
        "[name for name in sys.modules if name.startswith('vllm.v1.worker.gpu') and name[-3:] != 'gpu'])"
    )
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "missing [] []" in out.stdout


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
    if module == vllm_api.INPLACE and not has_reload_function():
        pytest.skip("this vLLM has no such function")
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
    passes_on = ["self", "args", "kwargs"]
    if (module, cls) != vllm_api.RUNNERS[0] and not has_reload_function():
        assert list(parameters) == passes_on
        assert "GPUModelRunnerV1.reload_weights(self, *args, **kwargs)" in inspect.getsource(
            inspect.unwrap(runner.reload_weights)
        )
    else:
        assert list(parameters) == ["self", "weights_iterator", "weights_path", "is_checkpoint_format"]


def test_an_executor_asks_the_ranks_and_reads_their_answers_as_we_expect() -> None:
    executor, worker = vllm_api.get(*vllm_api.EXECUTOR), vllm_api.get(*vllm_api.WORKER_PROCESS)
    asks = inspect.unwrap(executor.collective_rpc)
    wanted = {"unique_reply_rank", "kv_output_aggregator"}
    assert wanted <= inspect.signature(asks).parameters.keys()
    assert "self.response_mqs" in inspect.getsource(asks)
    assert ".dequeue(timeout=" in inspect.getsource(asks)
    if hasattr(worker, "_execute_worker_rpc"):
        called = inspect.unwrap(worker._execute_worker_rpc)
        assert list(inspect.signature(called).parameters) == ["self", "rpc_request"]
    else:
        loop = inspect.getsource(inspect.unwrap(worker.worker_busy_loop))
        assert loop.count("self.rpc_broadcast_mq.dequeue(") == 1


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


@pytest.fixture
def registering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Registers the plugin anew and returns the lines that it logged; afterwards all is as it was."""
    plugin.unregister()
    lines = Lines()
    plugin.logger.addHandler(lines)
    monkeypatch.setattr(plugin.logger, "level", logging.INFO)
    plugin.logger.manager._clear_cache()

    def register() -> list[str]:
        plugin.register()
        return lines.lines

    try:
        yield register
    finally:
        plugin.unregister()
        plugin.logger.removeHandler(lines)
        monkeypatch.undo()
        plugin.logger.manager._clear_cache()
        plugin.register()


def pretend(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    for place in (vllm_api, seams):
        monkeypatch.setattr(place, "version", lambda: version)


@pytest.mark.parametrize("version", ["0.11.2", "0.23.1", None, "unknown"])
def test_an_unsupported_vllm_is_left_alone_with_one_line(
    registering: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    pretend(monkeypatch, version)
    (line,) = registering()
    assert plugin.patched() == []
    assert str(version) in line
    assert vllm_api.supported_range() in line


@pytest.mark.parametrize("version", ["0.99.0", "0.34.0rc1.dev12+g0123456", "1.0.0"])
def test_a_newer_vllm_that_has_all_seams_is_tried_and_one_line_says_so(
    registering: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    pretend(monkeypatch, version)
    monkeypatch.setattr(seams, "seams_of", lambda _: SEAMS)  # those of the installed one stand for its own
    monkeypatch.setattr(vllm_api, "minor_of", lambda _: MINOR)
    (line,) = registering()
    assert plugin.patched()
    assert version in line
    assert "not tested" in line


def test_a_newer_vllm_is_left_alone_where_the_user_wants_it_strictly(
    registering: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "0.99.0")
    monkeypatch.setenv("RELOAD_PLUGIN_STRICT", "1")
    (line,) = registering()
    assert plugin.patched() == []
    assert "0.99.0" in line
    assert "RELOAD_PLUGIN_STRICT" in line


def test_strictness_does_not_concern_tested_versions(
    registering: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELOAD_PLUGIN_STRICT", "1")
    registering()
    assert plugin.patched()


def test_without_one_of_its_seams_vllm_is_left_alone_and_the_line_names_it(
    registering: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them taken out by hand, one at a time."""
    for seam in SEAMS:
        owner = importlib.import_module(seam.module)
        *classes, name = seam.name.split(".")
        for cls in classes:
            owner = getattr(owner, cls)
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            line = registering()[-1]
        assert str(seam) in line
        assert plugin.patched() == []


@pytest.mark.parametrize("row", vllm_api.SUPPORTED, ids=lambda row: vllm_api.name_of(row.minor))
def test_each_supported_minor_has_its_calls_and_its_hooks(row: vllm_api.Supported) -> None:
    """One and the same symbol is called by the calls of a minor, and listed among its seams."""
    named = {seam.name for seam in vllm_api.seams_of(row.minor)}
    calls = inspect.getsource(type(ranges._range_of(row.minor)()).map_name)
    assert ("mapper.map_name" in calls) is ("WeightsMapper.map_name" in named)
    hooks = inspect.getsource(type(hooks_for(row.minor)).patch_worker_process)
    assert ("_execute_worker_rpc" in hooks) is ("WorkerProc._execute_worker_rpc" in named)
    reload = inspect.getsource(type(hooks_for(row.minor)).patch_reload)
    assert ("INPLACE" in reload) is ("reload_weights" in named)


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
