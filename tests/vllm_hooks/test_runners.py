"""Where the V1 runner's method is what reloads (vLLM up to 0.31), and the V2 runner's calls it."""

from typing import Any

import pytest
import torch

from reload_plugin import vllm_api
from reload_plugin.errors import WeightsError
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.vllm_hooks import runners
from tests.transaction.test_session import A, B, Model, cold, registered, start, values  # noqa: F401 - a fixture among them

pytestmark = pytest.mark.usefixtures("registered")


def own(self: Any, *args: Any, **kwargs: Any) -> None:
    raise AssertionError("vLLM's own reload ran")


class V1:
    """As far as a reload needs it."""

    reload_weights = runners.reloading_itself(own)

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.reset: list[str] = []

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reset_lora_state(self) -> None:
        self.reset.append("lora")

    def reset_mm_cache(self) -> None:
        self.reset.append("multimodal")


class V2(V1):
    """As vLLM's, which passes on what it gets."""

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        V1.reload_weights(self, *args, **kwargs)


@pytest.mark.parametrize("runner", [V1, V2])
def test_a_reload_is_ours_and_the_runner_resets_what_it_has(runner: type) -> None:
    one = runner(start())
    one.reload_weights(weights_iterator=iter(B.items()))
    assert values(one.model) == values(cold(Model, B))
    assert one.reset == ["lora", "multimodal"]


@pytest.mark.parametrize("runner", [V1, V2])
def test_options_arrive(runner: type) -> None:
    one = runner(start())
    one.reload_weights(weights_iterator=iter(B.items()), weight_version="step 7")
    assert state_of(one.model).generation.weight_version == "step 7"


@pytest.mark.parametrize("runner", [V1, V2])
def test_nothing_is_reset_by_a_reload_that_fails(runner: type) -> None:
    one = runner(start())
    with pytest.raises(WeightsError):
        one.reload_weights(weights_iterator=iter(list(B.items())[:1]))
    assert one.reset == []


@pytest.mark.parametrize("runner", [V1, V2])
def test_the_older_name_of_an_argument_and_unknown_ones(runner: type) -> None:
    one = runner(start())
    one.reload_weights(iter(B.items()), process_weights_after_loading=True)
    assert values(one.model) == values(cold(Model, B))
    with pytest.raises(TypeError, match="unheard_of"):
        one.reload_weights(iter(A.items()), unheard_of=1)
    assert values(one.model) == values(cold(Model, B))


def test_a_model_that_was_built_before_gets_vllms_own() -> None:
    found: list[tuple[Any, ...]] = []
    reload = runners.reloading_itself(lambda *given, **_: found.append(given))
    reload(V1(torch.nn.Linear(2, 2)), weights_path="/somewhere")
    assert [given[1:] for given in found] == [(None, "/somewhere", True)]


def test_the_real_v2_runner_passes_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not start without Triton; its method runs on a stand-in."""
    import importlib

    module, cls = vllm_api.RUNNERS[1]
    method = getattr(importlib.import_module(module), cls).reload_weights
    one = V1(start())
    monkeypatch.setattr(one, "reset_encoder_cache", lambda: None, raising=False)
    one.vllm_config = None
    method(one, weights_iterator=iter(B.items()), weight_version="by the second runner")
    assert values(one.model) == values(cold(Model, B))
    assert state_of(one.model).generation.weight_version == "by the second runner"
