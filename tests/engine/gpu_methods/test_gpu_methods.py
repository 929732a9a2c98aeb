"""vLLM's quantization methods for GPUs, reloaded on a machine without one.

The layers' own code runs: creating weights, loading them, processing them after loading. Only the custom
operations it calls are stand-ins (see `operations`, `libraries` and `stand_ins`), so every promise about
values, attributes and addresses is tested up to, and not including, a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from reload_plugin import vllm_api
from tests.engine.gpu_methods import check
from tests.engine.gpu_methods.process import Worker
from tests.engine.gpu_methods.rows import NEWER, NOT_RUN, ROWS

NAMES = [row.name for row in ROWS + NEWER]
INSTALLED = vllm_api.minor_of(vllm_api.version())
METHODS = [
    pytest.param(row.name, marks=pytest.mark.skipif(row.since > INSTALLED, reason="not in this vLLM"))
    for row in ROWS + NEWER
]
SHOWN = 12


def _text(lines: list[str]) -> str:
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(["", *lines[:SHOWN], *rest])


def _asker(function: Callable, initializer: Callable[[], None]) -> Iterator[Callable]:
    """Ask once a row, however many tests look at the answer; a failure is an answer too."""
    worker = Worker(initializer)
    answers: dict[str, Future] = {}

    def ask(name: str) -> object:
        if name not in answers:
            answers[name] = worker(function, name)
        return answers[name].result()

    yield ask
    worker.close()


@pytest.fixture(scope="module")
def cold() -> Iterator[Callable[[str], check.Cold]]:
    yield from _asker(check.cold, check.start)


@pytest.fixture(scope="module")
def warm() -> Iterator[Callable[[str], check.Warm]]:
    yield from _asker(check.warm, check.start_with_plugin)


@pytest.mark.parametrize("name", METHODS)
def test_the_row_runs_the_method_it_names(cold: Callable[[str], check.Cold], name: str) -> None:
    assert not cold(name).missing, _text(cold(name).missing)


@pytest.mark.parametrize("name", METHODS)
def test_two_cold_starts_on_the_same_weights_agree(cold: Callable[[str], check.Cold], name: str) -> None:
    """Without this, a stand-in that invents values would be blamed on the reload."""
    assert not cold(name).repeated, _text(cold(name).repeated)


@pytest.mark.parametrize("name", METHODS)
def test_other_weights_change_every_tensor(cold: Callable[[str], check.Cold], name: str) -> None:
    """Without this, a tensor that a reload forgets could look right."""
    assert not cold(name).same, _text(cold(name).same)


@pytest.mark.parametrize("step", ["A to A", "A to B", "A to B to A"])
@pytest.mark.parametrize("name", METHODS)
def test_a_reloaded_model_is_the_cold_one(warm: Callable[[str], check.Warm], name: str, step: str) -> None:
    assert not warm(name).differences[step], _text(warm(name).differences[step])


@pytest.mark.parametrize("name", METHODS)
def test_a_reload_moves_no_tensor(warm: Callable[[str], check.Warm], name: str) -> None:
    assert not warm(name).moved, _text(warm(name).moved)


def test_rows_have_names_of_their_own() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(("what", "why"), NOT_RUN)
def test_each_method_left_out_has_a_reason(what: str, why: str) -> None:
    assert what not in NAMES
    assert len(why.split()) > 3
