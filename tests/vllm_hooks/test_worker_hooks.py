"""What the plugin puts into vLLM's worker: the guard of the forward pass, sleep, and the models it finds."""

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from reload_plugin import vllm_api
from reload_plugin.digest import digest
from reload_plugin.errors import EngineBrokenError, PartialUpdateError, ReloadError
from reload_plugin.transaction.chunked_update import open_layerwise
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.reload import reload_weights
from reload_plugin.transaction.status import status_of
from reload_plugin.vllm_hooks import workers
from tests.transaction.test_session import A, B, Model, cold, registered, start, values  # noqa: F401 - a fixture among them


def wrapped(name: str, inside: object) -> object:
    """A wrapper of vLLM around a model. Their constructors need a GPU; what they are asked here does not."""
    module = {
        "CUDAGraphWrapper": "vllm.compilation.cuda_graph",
        "BreakableCUDAGraphWrapper": "vllm.compilation.breakable_cudagraph",
        "UBatchWrapper": "vllm.v1.worker.gpu_ubatch_wrapper",
    }[name]
    cls = vllm_api.get(module, name)
    wrapper = cls.__new__(cls)
    vars(wrapper).update(runnable=inside, is_debugging_mode=False)
    return wrapper


MINOR = vllm_api.minor_of(vllm_api.version())
NESTED = [
    ("CUDAGraphWrapper",),
    ("UBatchWrapper",),
    ("BreakableCUDAGraphWrapper",),
    ("CUDAGraphWrapper", "BreakableCUDAGraphWrapper"),
    ("UBatchWrapper", "BreakableCUDAGraphWrapper"),
    ("UBatchWrapper", "CUDAGraphWrapper", "BreakableCUDAGraphWrapper"),
]


def nested(names: tuple[str, ...], model: nn.Module) -> object:
    found: object = model
    for name in reversed(names):
        found = wrapped(name, found)
    return found


class Runner:
    """A model runner's two questions; ``model`` may be one of vLLM's wrappers."""

    def __init__(self, model: object, draft: object = None) -> None:
        self.model, self.draft = model, draft

    def get_model(self) -> object:
        return self.model

    def get_draft_model(self) -> object:
        return self.draft

    def post_kv_cache_wake_up(self) -> None:
        """vLLM 0.25 calls it after every wake-up."""


class Worker:
    """vLLM's worker, as far as the hooks meet it."""

    weight_transfer_engine = None
    _weight_update_active = False

    def __init__(self, model: object, draft: object = None) -> None:
        self.model_runner = Runner(model, draft)

    def execute_model(self) -> str:
        return "tokens"

    def update_weights(self) -> None:
        raise OSError("the line went dead")


def forward_pass(worker: object) -> str:
    answer: str = workers.guarding(Worker.execute_model)(worker)
    return answer


def half_way(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield next(iter(weights.items()))
    raise OSError("gone")


def break_by_streaming(model: nn.Module) -> None:
    """Part of B is served and A cannot be read again."""
    reload_weights(model, iter(A.items()))  # from then on weights are committed layer by layer
    with pytest.raises(EngineBrokenError):
        reload_weights(model, half_way(B), policy="streaming")


# --- which models ---


@pytest.mark.parametrize("names", NESTED, ids="-".join)
def test_the_models_of_a_worker_are_found_inside_of_wrappers(names: tuple[str, ...]) -> None:
    main, draft = start(), start()
    worker = Worker(nested(names, main), nested(names, draft))
    assert vllm_api.models_of(worker) == [main, draft]


def test_a_worker_without_a_model_has_none() -> None:
    class NotLoaded:
        def get_model(self) -> nn.Module:
            raise ValueError("Cannot get model before model has been initialized")

    assert vllm_api.models_of(object()) == []
    assert vllm_api.models_of(types.SimpleNamespace(model_runner=NotLoaded())) == []
    assert vllm_api.models_of(types.SimpleNamespace(model_runner=Runner(start()))) != []


@pytest.mark.parametrize("names", NESTED, ids="-".join)
def test_a_wrapped_model_is_reloaded_by_us(names: tuple[str, ...]) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    inplace = pytest.importorskip("vllm.model_executor.model_loader.reload.inplace")
    model = start()
    inplace.reload_weights(None, nested(names, model), iter(B.items()), None, True)
    assert values(model) == values(cold(Model, B))
    assert state_of(model).generation.version == 1
    layerwise.initialize_layerwise_reload(nested(names, model))
    model.load_weights(iter(A.items()))
    layerwise.finalize_layerwise_reload(nested(names, model), None)
    assert values(model) == values(cold(Model, A))
    assert state_of(model).generation.version == 2


# --- each engine by itself ---


@pytest.mark.parametrize("names", [(), *NESTED], ids=lambda names: "-".join(names) or "plain")
def test_a_broken_engine_stops_itself_and_no_other_of_its_process(names: tuple[str, ...]) -> None:
    first, second = start(), start()
    a, b = Worker(nested(names, first)), Worker(nested(names, second))
    break_by_streaming(first)
    with pytest.raises(EngineBrokenError, match="does not serve"):
        forward_pass(a)
    assert forward_pass(b) == "tokens"
    reload_weights(first, iter(B.items()))
    assert forward_pass(a) == "tokens"


def test_a_broken_draft_model_stops_its_worker() -> None:
    main, draft = start(), start()
    break_by_streaming(draft)
    with pytest.raises(EngineBrokenError, match="does not serve"):
        forward_pass(Worker(main, draft))


def test_the_update_of_one_engine_goes_on_when_a_chunk_of_another_fails() -> None:
    first, second, draft = start(), start(), start()
    for model in (first, second, draft):
        open_layerwise(model)
    with pytest.raises(OSError, match="the line went dead"):
        workers.ending(Worker.update_weights)(Worker(first, draft))
    assert state_of(first).update is state_of(draft).update is None
    assert state_of(second).update is not None
    other = type("Other", (Worker,), {})
    workers.add_worker_calls(other)
    assert other(first).abort_weight_update() is False
    assert other(second).abort_weight_update() is True
    assert state_of(second).update is None


# --- sleep ---


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Digests that were made."""
    found: list[object] = []
    make = digest.digest_of
    monkeypatch.setattr(digest, "digest_of", lambda *given, **how: found.append(given) or make(*given, **how))
    return found


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> type:
    """vLLM's own worker, where a sleep takes no memory away."""
    worker: type = vllm_api.get(*vllm_api.WORKER)
    start()  # workers are patched when a model has been recorded
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (1, 2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1, 2))  # vLLM 0.24

    class Sleeping(worker):
        def __init__(self, model: nn.Module | None = None, draft: nn.Module | None = None) -> None:
            config = types.SimpleNamespace(
                enable_nccl_comm_suspend=False, sleep_preserve_parameter_names=None
            )
            self.vllm_config = types.SimpleNamespace(model_config=config)
            self.model_config = config
            self.calls: list[object] = []
            suspend, resume = self.calls.append, self.calls.append
            self._sleep_mode_backend = types.SimpleNamespace(
                suspend=suspend, resume=resume, discard=self.calls.append
            )
            self._sleep_saved_parameters = self._sleep_saved_buffers = self._sleep_saved_draft_buffers = {}
            self._sleep_rebuild_draft_metadata_buffers = False
            self.synchronize_device = lambda: None
            monkeypatch.setattr(
                sys.modules[worker.__module__], "get_mem_allocator_instance", self._allocator, raising=False
            )
            if model is not None:
                self.model_runner = Runner(model, draft)

        def _allocator(self) -> object:
            """What vLLM 0.24 asks instead of a backend."""
            backend = self._sleep_mode_backend
            return types.SimpleNamespace(
                sleep=lambda offload_tags: backend.suspend(1 if offload_tags else 2),
                wake_up=lambda tags: backend.resume(tags),
            )

    return Sleeping


def test_sleep_hashes_nothing_and_a_digest_asked_for_later_is_true(
    sleeping: type, hashed: list[object]
) -> None:
    model = start()
    worker = sleeping(model)
    worker.sleep(level=1)
    assert hashed == []
    assert status_of(model).digest is None, "weights that sleep cannot be read"
    assert hashed == []
    worker.wake_up(tags=["kv_cache"])
    assert status_of(model).digest is None
    worker.wake_up(tags=["weights"])
    awake = status_of(model)
    assert (awake.state, awake.digest) == ("serving", status_of(start()).digest)
    worker.sleep()
    assert status_of(model).digest == awake.digest, "what was made before is known still"
    worker.wake_up()
    assert forward_pass(worker) == "tokens"
    assert worker.calls == [1, ["kv_cache"], ["weights"], 1, None]


@pytest.mark.parametrize("level", [1, 2])
def test_a_worker_without_a_model_sleeps_as_without_us(
    sleeping: type, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if MINOR < (0, 29):
        pytest.skip("vLLM's worker asks its model's runner when it wakes up")
    worker = sleeping()
    monkeypatch.setattr(worker, "_save_sleep_parameters", lambda _: None, raising=False)
    monkeypatch.setattr(worker, "get_draft_model", lambda: None)
    if level == 2:
        worker.model_runner = types.SimpleNamespace(model=nn.Linear(2, 2))
    worker.sleep(level=level)
    worker.wake_up()
    assert worker.calls == [level, None]


@pytest.mark.parametrize("how", ["by name", "by place", "discard"])
def test_after_its_weights_were_discarded_an_engine_claims_nothing(sleeping: type, how: str) -> None:
    model, draft = start(), start()
    reload_weights(model, iter(A.items()), keep_load_format="host")
    worker = sleeping(model, draft)
    if how == "discard" and not hasattr(worker, "discard"):
        pytest.skip("vLLM discards nothing alone before 0.31")
    model.__dict__["named_buffers"] = draft.__dict__["named_buffers"] = list
    worker.model_runner.model = model
    if how == "discard":
        worker.discard(("weights",))
    elif how == "by name":
        worker.sleep(level=2)
    else:
        worker.sleep(2)
    worker.wake_up()
    for each in (model, draft):
        state = status_of(each)
        assert (state.state, state.digest) == ("lost", None)
        assert "discarded" in state.last_error
        assert state_of(each).rollback_source is None
    with pytest.raises(EngineBrokenError, match="Reload a complete checkpoint to heal it"):
        forward_pass(worker)
    with pytest.raises((PartialUpdateError, ReloadError)):
        reload_weights(model, iter([next(iter(B.items()))]), partial=True)
    with pytest.raises(EngineBrokenError):
        forward_pass(worker)
    reload_weights(model, iter(B.items()))
    reload_weights(draft, iter(B.items()))
    assert forward_pass(worker) == "tokens"
    assert status_of(model).digest == status_of(cold(Model, B)).digest


def test_discarding_the_cache_loses_no_weights(sleeping: type) -> None:
    model = start()
    worker = sleeping(model)
    if not hasattr(worker, "discard"):
        pytest.skip("vLLM discards nothing alone before 0.31")
    worker.discard(("kv_cache",))
    assert status_of(model).state == "serving"
    assert forward_pass(worker) == "tokens"


def test_a_sleep_that_did_not_begin_loses_nothing(sleeping: type) -> None:
    model = start()
    worker = sleeping(model)

    def refused(level: int) -> None:
        raise RuntimeError("sleep mode is not enabled")

    worker.model_runner.model = model
    worker._sleep_mode_backend = types.SimpleNamespace(suspend=refused, state=lambda: "RUNNING")
    with pytest.raises(RuntimeError, match="not enabled"):
        worker.sleep(level=2)
    assert status_of(model).state == "serving"


def test_a_sleep_that_failed_after_the_weights_had_gone_has_lost_them(
    sleeping: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM looks at the free memory when the weights have been discarded, and may raise then."""
    model = start()
    worker = sleeping(model)
    worker.model_runner.model = model
    worker._sleep_mode_backend.state = lambda: "SUSPENDED"
    free = iter([(2, 2), (1, 2)])
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: next(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: next(free))  # vLLM 0.24
    with pytest.raises(AssertionError, match="Memory usage increased"):
        worker.sleep(level=2)
    assert status_of(model).state == "asleep"
    worker.wake_up()
    assert status_of(model).state == "lost"
