"""Every road of `tests.roads` on every kind of model, in one engine a model."""

from collections.abc import Callable, Iterator

import pytest

from reload_plugin.vllm_hooks import workers
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


@pytest.mark.parametrize("lab", ["llama_tied"], indirect=True)
def test_a_tied_head_that_follows_its_push_has_to_be_the_embedding(lab: roads.Lab) -> None:
    """A trainer that walks its state dict sends the head after the weights that end the push."""
    head, weights = "lm_head.weight", lab.weights["B"]
    embedding = next(tensor for name, tensor in weights if name.endswith("embed_tokens.weight"))
    roads.tensor_by_tensor(lab, weights)
    lab.model.load_weights([(head, embedding)])
    lab.serve()
    assert lab.difference("B") == ""

    def with_another_head() -> None:
        roads.tensor_by_tensor(lab, weights)
        lab.model.load_weights([(head, embedding + 1)])
        lab.rpc(lambda worker: workers.guarding(lambda *_: None)(worker))

    roads.refused(lab, with_another_head, "differs from the embedding")
    assert lab.difference("B") == ""
    embedding = next(tensor for name, tensor in lab.weights["A"] if name.endswith("embed_tokens.weight"))
    roads.tensor_by_tensor(lab, [*lab.weights["A"], (head, embedding)])
    assert lab.difference("A") == ""
