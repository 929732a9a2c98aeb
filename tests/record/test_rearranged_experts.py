"""Experts that the engine has moved since its start are not loaded to where they were."""

import gc
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.eplb.eplb_state import EplbLayerState, EplbState

from reload_plugin import restore_for_reloading, vllm_api
from reload_plugin.errors import UnsupportedError
from reload_plugin.record.recorder import record_constructed
from reload_plugin.transaction.chunked_update import abort_weight_update, finish_layerwise, open_layerwise
from reload_plugin.transaction.reload import reload_weights
from tests.transaction.test_session import CONFIG, CPU, A, B, Method, Model, registered, utils, values  # noqa: F401 - a fixture among them

EXPERTS, COPIES = 4, 3
HOME = [0, 1, 2, 3, 0, 1]


def state_with(places: list[int]) -> EplbLayerState:
    """vLLM's state of a layer whose place ``i`` has expert ``places[i]``."""
    table = [[p for p, expert in enumerate(places) if expert == e] for e in range(EXPERTS)]
    table = [row + [-1] * (COPIES - len(row)) for row in table]
    return EplbLayerState(logical_to_physical_map=torch.tensor(table))


class Router:
    def __init__(self) -> None:
        self.eplb_state = EplbLayerState()


class Routed(Model):
    def __init__(self) -> None:
        super().__init__(Method)
        self.first.router = Router()


def routed(places: list[int], enabled: bool = True) -> nn.Module:
    model = Routed()
    config = VllmConfig()
    config.parallel_config.enable_eplb = enabled
    config.load_config.load_format = "by the test"
    record_constructed(model, None, config)
    model.load_weights(iter(A.items()))
    utils.process_weights_after_loading(model, CONFIG, CPU)
    model.first.router.eplb_state = state_with(places)
    return model


ROADS: dict[str, Callable[[nn.Module], object]] = {
    "reload": lambda model: reload_weights(model, iter(B.items())),
    "update": open_layerwise,
    "live push": lambda model: model.load_weights(iter(B.items())),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("places", [[1, 0, 2, 3, 0, 1], [0, 1, 2, 3, 1, 0], [0, 1, 2, 3, 0, 3]])
def test_a_reload_is_refused_once_experts_were_moved(places: list[int], road: str) -> None:
    model = routed(places)
    before = values(model)
    with pytest.raises(UnsupportedError, match="rearranged"):
        ROADS[road](model)
    assert values(model) == before


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(("places", "enabled"), [(HOME, True), ([3, 2, 1, 0, 0, 1], False)])
def test_experts_where_they_were_are_reloaded(places: list[int], enabled: bool, road: str) -> None:
    ROADS[road](routed(places, enabled))


def rearranging(model: nn.Module, **flags: object) -> EplbState:
    """vLLM's balancer of a model, which is at work."""
    balancer = EplbState(VllmConfig().parallel_config, CPU)
    balancer.model_states["model"] = types.SimpleNamespace(
        model=model, **({"rebalanced": False, "pending_result": None} | flags)
    )
    vllm_api.note_balancer(balancer)
    return balancer


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("flags", [{"rebalanced": True}, {"pending_result": object()}])
def test_a_reload_is_refused_while_experts_are_moved(road: str, flags: dict[str, object]) -> None:
    model, other = routed(HOME), routed(HOME)
    before, balancer = values(model), rearranging(model, **flags)
    with pytest.raises(UnsupportedError, match="being rearranged"):
        ROADS[road](model)
    assert values(model) == before
    ROADS[road](other)  # of another engine
    balancer.model_states["model"].rebalanced = False
    balancer.model_states["model"].pending_result = None
    ROADS[road](model)


def by_layers(model: nn.Module, move: Callable[[], object]) -> object:
    open_layerwise(model)
    model.load_weights(iter({"first.weight": B["first.weight"]}.items()))
    held = move()
    model.load_weights(iter({"lm_head.weight": B["lm_head.weight"]}.items()))
    return held, finish_layerwise(model)


def by_block(model: nn.Module, move: Callable[[], object]) -> object:
    with restore_for_reloading(model) as update:
        update.load(iter(B.items()))
        return move()


def by_push(model: nn.Module, move: Callable[[], object]) -> object:
    model.load_weights(iter(B.items()))  # of a first push nobody knows whether it is all
    return move(), utils.process_weights_after_loading(model, CONFIG, CPU)


@pytest.mark.parametrize("where", ["moved", "being moved"])
@pytest.mark.parametrize("update", [by_layers, by_block, by_push])
def test_an_update_during_which_experts_were_moved_is_not_committed(update: Callable, where: str) -> None:
    """The engine serves in between, and balances."""
    model = routed(HOME)
    table = model.first.router.eplb_state.logical_to_physical_map
    home, before = table.clone(), values(model)

    def move() -> EplbState | None:
        if where == "being moved":
            return rearranging(model, rebalanced=True)
        table.copy_(state_with([1, 0, 2, 3, 0, 1]).logical_to_physical_map)
        return None

    with pytest.raises(UnsupportedError, match="rearranged"):
        update(model, move)
    abort_weight_update(model)
    table.copy_(home)
    gc.collect()  # the balancer
    assert values(model) == before
    ROADS["reload"](model)
