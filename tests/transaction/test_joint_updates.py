"""Updates in several calls on several engines: all are committed, or none. The engines are models in threads
of one process; their votes go over a real store.
"""

import threading
import time

import pytest
from torch import nn

from reload_plugin.errors import ReloadError
from reload_plugin.ranks.joint import JointReload
from reload_plugin.transaction.chunked_update import (
    abort_weight_update,
    finish_layerwise,
    finishing_together,
    open_layerwise,
)
from reload_plugin.transaction.engine_state import state_of
from tests.transaction.test_session import (
    A,
    B,
    Model,
    Packing,
    cold,
    registered,  # noqa: F401 - the fixture is used by itself
    values,
)

NAMES = ("engine 1", "engine 2")


@pytest.fixture
def models() -> list[nn.Module]:
    return [cold(lambda: Model(Packing), A) for _ in NAMES]


def push(models: list[nn.Module], lost: int | None = None) -> list[str]:
    """B to all of them, but its last weight to the one that is ``lost``; what each finish came to."""
    joint = JointReload(dict.fromkeys(NAMES, 1), 20.0)
    found = ["never ended"] * len(models)

    def finish(number: int) -> None:
        try:
            with finishing_together(joint.option(NAMES[number], "127.0.0.1")):
                finish_layerwise(models[number])
            found[number] = "committed"
        except ReloadError as error:
            found[number] = f"{type(error).__name__}: {error}"

    for number, model in enumerate(models):
        open_layerwise(model)
        items = list(B.items())[: -1 if number == lost else None]
        for item in items:
            model.load_weights(iter([item]))
    threads = [threading.Thread(target=finish, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_all_commit(models: list[nn.Module]) -> None:
    wanted = values(cold(lambda: Model(Packing), B))
    assert push(models) == ["committed"] * len(NAMES)
    assert [values(model) for model in models] == [wanted] * len(NAMES)


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_lacks_a_weight_leaves_all_on_the_old_ones(models: list[nn.Module], lost: int) -> None:
    before = [values(model) for model in models]
    started = time.monotonic()
    found = push(models, lost)
    assert time.monotonic() - started < 10
    assert "MissingWeightsError" in found[lost]
    assert "RanksDisagreeError" in found[1 - lost]
    assert f"{NAMES[lost]} rank 0: MissingWeightsError" in found[1 - lost]
    assert [values(model) for model in models] == before
    assert [state_of(model).broken for model in models] == [None, None]
    assert [abort_weight_update(model) for model in models] == [True, True]
    assert push(models) == ["committed"] * len(NAMES)


def test_what_is_no_option_leaves_the_update_open(models: list[nn.Module]) -> None:
    open_layerwise(models[0])
    with pytest.raises(ReloadError, match="together is not valid"), finishing_together({"store": "x"}):
        finish_layerwise(models[0])
    assert abort_weight_update(models[0])
