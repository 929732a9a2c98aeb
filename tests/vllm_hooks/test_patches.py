"""Functions of vLLM are replaced wherever somebody has bound them, and put back."""

import sys
import threading
import types

import pytest

from reload_plugin.record.model_record import record_of
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.vllm_hooks import construction, patches, plugin
from tests.transaction.test_session import CONFIG, A, B, Model, cold, registered, start, values  # noqa: F401 - a fixture among them


class Forbidding(types.ModuleType):
    """A module that imports something, or fails, when it is asked for an attribute."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"{name} was asked for")


class Proxy:
    """No module, but in ``sys.modules`` and pretending to be one."""

    @property
    def __class__(self) -> type:
        raise RuntimeError("the class was asked for")


def test_names_that_a_trainer_bound_before_are_replaced_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.unregister()
    try:
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        trainer = Forbidding("somebodys_trainer")
        trainer.begin, trainer.end = initialize_layerwise_reload, finalize_layerwise_reload
        monkeypatch.setitem(sys.modules, "somebodys_trainer", trainer)
        monkeypatch.setitem(sys.modules, "somebodys_proxy", Proxy())
        monkeypatch.setitem(sys.modules, "somebodys_gap", None)
        ours = types.ModuleType("reload_plugin.mine")
        ours.kept = initialize_layerwise_reload
        monkeypatch.setitem(sys.modules, "reload_plugin.mine", ours)
        plugin.register()
        assert ours.kept is initialize_layerwise_reload
        assert vars(trainer)["begin"] is not initialize_layerwise_reload
        model = start()
        trainer.begin(model)
        model.load_weights(iter(B.items()))
        trainer.end(model, CONFIG)
        assert values(model) == values(cold(Model, B))
        assert state_of(model).generation.version == 1
        plugin.unregister()
        assert vars(trainer)["begin"] is initialize_layerwise_reload
        assert vars(trainer)["end"] is finalize_layerwise_reload
    finally:
        plugin.register()


def test_a_name_that_somebody_replaced_after_us_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    ours = layerwise.initialize_layerwise_reload

    def theirs(model: object) -> None:
        ours(model)

    monkeypatch.setattr(layerwise, "initialize_layerwise_reload", theirs)
    try:
        plugin.unregister()
        assert layerwise.initialize_layerwise_reload is theirs
    finally:
        monkeypatch.setattr(layerwise, "initialize_layerwise_reload", ours.__wrapped__)
        plugin.register()
        monkeypatch.undo()
        plugin.unregister()
        layerwise.initialize_layerwise_reload = ours.__wrapped__
        plugin.register()


@pytest.mark.parametrize("last", ["finalize_layerwise_reload", "finalize_layerwise_processing"])
@pytest.mark.parametrize("home", ["reload", "reload.layerwise"])
def test_an_update_may_end_with_either_of_vllms_functions(home: str, last: str) -> None:
    import importlib

    module = importlib.import_module(f"vllm.model_executor.model_loader.{home}")
    model = start()
    for weights, version in ((B, 1), (A, 2)):
        module.initialize_layerwise_reload(model)
        model.load_weights(iter(weights.items()))
        getattr(module, last)(model, CONFIG)
        assert values(model) == values(cold(Model, weights))
        assert state_of(model).generation.version == version


def test_two_models_built_at_once_are_both_recorded() -> None:
    """Each thread builds one; the second begins while the first is under way."""
    begun, go_on = threading.Event(), threading.Event()
    built: dict[str, object] = {}

    def slowly() -> Model:
        begun.set()
        assert go_on.wait(10)
        return Model()

    def build() -> None:
        built["first"] = construction.recording_construction(slowly)()

    thread = threading.Thread(target=build)
    thread.start()
    assert begun.wait(10)
    built["second"] = construction.recording_construction(Model)()
    go_on.set()
    thread.join(10)
    assert all(record_of(built[name]) is not None for name in ("first", "second"))


def test_copies_of_a_method_in_subclasses_are_patched_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray runs an actor in a subclass that has copies of all methods of the actor's class."""

    class Worker:
        def run(self) -> str:
            return "plain"

    class Inherits(Worker):
        pass

    class Copy(Inherits):
        run = Worker.run

    module = types.ModuleType("module_of_workers")
    module.Worker = Worker
    monkeypatch.setitem(sys.modules, "module_of_workers", module)
    monkeypatch.setattr(patches, "_patches", [])
    monkeypatch.setattr(patches, "_additions", [])
    for _ in range(2):
        patches.replace_method_of_all(
            "module_of_workers", "Worker", "run", lambda original: lambda self: f"patched {original(self)}"
        )
    assert [cls().run() for cls in (Worker, Inherits, Copy)] == ["patched plain"] * 3
    patches.undo_all()
    assert [cls().run() for cls in (Worker, Inherits, Copy)] == ["plain"] * 3
    assert "run" not in vars(Inherits)
