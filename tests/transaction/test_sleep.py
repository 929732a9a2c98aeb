"""Sleep and reloads: what a model says of itself, what it refuses meanwhile, and what it heals."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from reload_plugin.errors import EngineBrokenError, SessionError
from reload_plugin.transaction.chunked_update import (
    abort_weight_update,
    finish_layerwise,
    open_layerwise,
    restore_for_reloading,
)
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.reload import reload_weights
from reload_plugin.transaction.status import status_of
from reload_plugin.vllm_hooks import workers
from tests.transaction.test_session import A, B, Model, cold, registered, start, values  # noqa: F401 - a fixture among them
from tests.vllm_hooks.test_worker_hooks import Worker, forward_pass


def nothing(*_: object) -> None:
    """In place of vLLM's own, which needs a GPU."""


def sleep(model: nn.Module, level: int = 1) -> Worker:
    worker = Worker(model)
    workers.sleeping(nothing)(worker, level)
    return worker


def wake_up(worker: Worker, tags: list[str] | None = None) -> None:
    workers.waking(nothing)(worker, tags)


def spoil(model: nn.Module) -> None:
    """What a discard leaves: garbage in each tensor that the start of the model allocated."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))


def unreadable() -> Iterator[tuple[str, torch.Tensor]]:
    raise AssertionError("a weight was asked for")
    yield


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "reload": lambda model: reload_weights(model, unreadable()),
    "partial": lambda model: reload_weights(model, unreadable(), partial=True),
    "kernel format": lambda model: reload_weights(model, unreadable(), is_checkpoint_format=False),
    "update": open_layerwise,
    "block": lambda model: restore_for_reloading(model).__enter__(),
    "live push": lambda model: model.load_weights(unreadable()),
}


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("road", REFUSED)
def test_nothing_is_loaded_while_the_weights_are_away(road: str, level: int) -> None:
    model = start()
    worker = sleep(model, level)
    before = values(model)
    with pytest.raises(SessionError, match="Wake it up first"):
        REFUSED[road](model)
    with pytest.raises(SessionError, match="Wake it up first"):
        forward_pass(worker)
    wake_up(worker, ["kv_cache"])
    with pytest.raises(SessionError, match="Wake it up first"):
        REFUSED[road](model)
    assert values(model) == before
    assert state_of(model).update is None
    wake_up(worker, ["weights"])
    reload_weights(model, iter(B.items()))
    assert values(model) == values(cold(Model, B))
    assert forward_pass(worker) == "tokens"


@pytest.mark.parametrize("level", [1, 2])
def test_status_says_asleep_lost_and_serving(level: int) -> None:
    model = start()
    assert status_of(model).state == "serving"
    worker = sleep(model, level)
    assert status_of(model).state == "asleep"
    wake_up(worker, ["kv_cache"])
    assert status_of(model).state == "asleep"
    wake_up(worker, ["weights"])
    assert status_of(model).state == ("serving" if level == 1 else "lost")
    reload_weights(model, iter(B.items()))
    assert status_of(model).state == "serving"


def test_weights_that_were_set_to_zero_are_lost_until_a_reload() -> None:
    model = start()
    worker = Worker(model)

    def zeros(_: object) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()

    workers.resetting(zeros)(worker)
    found = status_of(model)
    assert (found.state, found.digest) == ("lost", None)
    assert "reset_weights" in str(found.last_error)
    with pytest.raises(EngineBrokenError, match="Reload a complete checkpoint to heal it"):
        forward_pass(worker)
    reload_weights(model, iter(B.items()))
    assert values(model) == values(cold(Model, B))
    assert forward_pass(worker) == "tokens"


@pytest.mark.parametrize("level", [1, 2])
def test_an_open_update_outlives_a_sleep_and_takes_no_weights_meanwhile(level: int) -> None:
    model = start()
    weights = list(B.items())
    open_layerwise(model)
    model.load_weights(iter(weights[:2]))
    worker = sleep(model, level)
    with pytest.raises(SessionError, match="Wake it up first"):
        model.load_weights(iter(weights[2:]))
    with pytest.raises(SessionError, match="Wake it up first"):
        finish_layerwise(model)
    if level == 2:
        spoil(model)
    wake_up(worker)
    assert state_of(model).update is not None
    model.load_weights(iter(weights[2:]))
    finish_layerwise(model)
    assert values(model) == values(cold(Model, B))
    assert forward_pass(worker) == "tokens"


def test_an_update_that_is_given_up_after_a_deep_sleep_leaves_the_weights_lost() -> None:
    model = start()
    open_layerwise(model)
    model.load_weights(iter(list(B.items())[:2]))
    worker = sleep(model, 2)
    spoil(model)
    wake_up(worker)
    assert abort_weight_update(model)
    assert status_of(model).state == "lost"
    with pytest.raises(EngineBrokenError):
        forward_pass(worker)


class Tables(Model):
    """Has a large table and a small plain tensor that its constructor computes and no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Module()
        self.table.register_buffer("large", torch.arange(1 << 16, dtype=torch.float32) / 3, persistent=False)
        self.table.small = torch.arange(8, dtype=torch.float32) / 3


def test_what_no_checkpoint_holds_is_there_again_after_a_discard() -> None:
    model = start(Tables)
    worker = Worker(model)
    expected = values(cold(Tables, B)), model.table.large.clone(), model.table.small.clone()

    def gone(*_: object) -> None:
        spoil(model)
        model.table.small.fill_(float("nan"))

    workers.discarding(gone)(worker, ("weights",))
    wake_up(worker)
    reload_weights(model, iter(B.items()))
    assert values(model) == expected[0]
    assert torch.equal(model.table.large, expected[1])
    assert torch.equal(model.table.small, expected[2])
