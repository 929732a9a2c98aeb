"""Every road of `tests.roads` on every kind of model, in one engine a model."""

from collections.abc import Callable, Iterator

import pytest

from tests import roads


@pytest.fixture(scope="module", params=roads.MODELS)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[roads.Lab]:
    with roads.lab(request.param, tmp_path_factory.mktemp("checkpoints")) as one:
        yield one


@pytest.mark.parametrize("road", roads.PUSHES, ids=lambda road: road.__name__)
def test_a_push_gives_the_engine_of_a_cold_start(lab: roads.Lab, road: Callable) -> None:
    assert roads.try_push(lab, road) == ""


@pytest.mark.parametrize("road", roads.FAILURES, ids=lambda road: road.__name__)
def test_a_push_that_fails_leaves_the_engine_as_it_was(lab: roads.Lab, road: Callable) -> None:
    assert roads.try_failure(lab, road) == ""
