"""One call at a time may change a model: other threads are refused or wait, and the engine is whole."""

import threading
from collections.abc import Iterator

import pytest
import torch

from reload_plugin import SessionError, reload_weights, restore_for_reloading
from reload_plugin.errors import EngineBrokenError
from reload_plugin.transaction.engine_state import state_of
from tests.transaction.test_session import (
    A,
    B,
    Model,
    Packing,
    cold,
    identities,
    registered,  # noqa: F401 - the fixture is used by itself
    values,
)


def slow(weights: dict[str, torch.Tensor], begun: threading.Event, go_on: threading.Event) -> Iterator:
    """Weights that stop after the first until they may go on."""
    for number, pair in enumerate(weights.items()):
        if number == 1:
            begun.set()
            assert go_on.wait(30)
        yield pair


def test_a_second_thread_is_refused_and_the_first_goes_on() -> None:
    model = cold(lambda: Model(Packing), A)
    places = identities(model)
    begun, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def first() -> None:
        try:
            reload_weights(model, slow(B, begun, go_on))
        except BaseException as error:  # noqa: BLE001 - told to the test
            errors.append(error)

    thread = threading.Thread(target=first, name="trainer 1")
    thread.start()
    assert begun.wait(30)
    with pytest.raises(SessionError, match="under way in thread trainer 1"):
        reload_weights(model, iter(A.items()))
    with pytest.raises(SessionError, match="under way in thread trainer 1"), restore_for_reloading(model):
        pass
    go_on.set()
    thread.join(30)
    assert not errors
    assert values(model) == values(cold(lambda: Model(Packing), B))
    assert identities(model) == places


def test_many_threads_that_reload_leave_one_of_their_generations() -> None:
    model = cold(lambda: Model(Packing), A)
    refused = []

    def reload(weights: dict[str, torch.Tensor]) -> None:
        for _ in range(20):
            try:
                reload_weights(model, iter(weights.items()))
            except SessionError as error:
                refused.append(error)

    threads = [threading.Thread(target=reload, args=(weights,)) for weights in (A, B, A, B)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    ends = [values(cold(lambda: Model(Packing), weights)) for weights in (A, B)]
    assert values(model) in ends
    assert len(refused) < 80


def test_a_forward_pass_of_another_thread_waits_for_a_reload() -> None:
    model = cold(lambda: Model(Packing), A)
    begun, go_on, passed = threading.Event(), threading.Event(), threading.Event()
    reloading = threading.Thread(target=lambda: reload_weights(model, slow(B, begun, go_on)))

    def serve() -> None:
        state_of(model).before_forward_pass()
        passed.set()

    reloading.start()
    assert begun.wait(30)
    serving = threading.Thread(target=serve)
    serving.start()
    assert not passed.wait(0.2), "it went on while the model was in load format"
    go_on.set()
    reloading.join(30)
    serving.join(30)
    assert passed.is_set()


def test_weights_that_the_engine_itself_is_to_make_are_refused() -> None:
    """An iterator that runs the engine would compute with the load format."""
    model = cold(lambda: Model(Packing), A)
    before = values(model)

    def made_by_the_engine() -> Iterator[tuple[str, torch.Tensor]]:
        for pair in B.items():
            state_of(model).before_forward_pass()
            yield pair

    with pytest.raises(SessionError, match="inside a call that reloads its weights"):
        reload_weights(model, made_by_the_engine())
    assert values(model) == before


def test_a_broken_model_does_not_stop_another() -> None:
    """A policy and a reward model in one process: each answers for itself."""
    one, other = cold(lambda: Model(Packing), A), cold(lambda: Model(Packing), A)
    reload_weights(one, iter(A.items()))  # from now on it is known which weights a group waits for
    with pytest.raises(EngineBrokenError):
        reload_weights(one, iter(list(B.items())[:1]), policy="streaming")
    with pytest.raises(EngineBrokenError):
        state_of(one).before_forward_pass()
    state_of(other).before_forward_pass()
    with restore_for_reloading(other):
        state_of(other).before_forward_pass()
        other.load_weights(iter(B.items()))
    assert values(other) == values(cold(lambda: Model(Packing), B))
    reload_weights(one, iter(B.items()))
    state_of(one).before_forward_pass()
