"""Attention sinks of vLLM 0.33: heads that a kernel pads have -inf, which the loader of the others writes."""

import pytest
import torch
from torch import nn

from reload_plugin import reload_weights, vllm_api
from reload_plugin.errors import MissingWeightsError
from reload_plugin.transaction.chunked_update import finish_layerwise, open_layerwise
from tests.transaction.test_session import (  # noqa: F401 - a fixture among them
    CONFIG,
    CPU,
    A,
    B,
    Method,
    Model,
    cold,
    identities,
    registered,
    utils,
    values,
)

HEADS, PADDED, SINKS = 6, 8, "first.sinks"

pytestmark = [
    pytest.mark.usefixtures("registered", "one_rank"),
    pytest.mark.skipif(
        vllm_api.minor_of(vllm_api.version()) < (0, 33), reason="this vLLM pads no attention sinks"
    ),
]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader import weight_utils

    monkeypatch.setattr(weight_utils, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(weight_utils, "get_tensor_model_parallel_rank", lambda: 0)


class Sinking(Model):
    """A layer with vLLM's own parameter and loader for sinks."""

    def __init__(self) -> None:
        from vllm.model_executor.model_loader.weight_utils import make_attention_sink

        super().__init__(Method)
        self.first.sinks = make_attention_sink(PADDED, torch.float32)


def with_sinks(weights: dict[str, torch.Tensor], start: float) -> dict[str, torch.Tensor]:
    return weights | {SINKS: torch.arange(HEADS) + start}


ON_A, ON_B = with_sinks(A, 1.0), with_sinks(B, 100.0)


def by_stream(model: nn.Module) -> None:
    reload_weights(model, iter(ON_B.items()))


def by_streaming(model: nn.Module) -> None:
    """Each layer is written over in place."""
    reload_weights(model, iter(ON_A.items()))
    reload_weights(model, iter(ON_B.items()), policy="streaming")


def twice(model: nn.Module) -> None:
    """The second one has a copy plan in place of the loader."""
    reload_weights(model, iter(ON_B.items()))
    reload_weights(model, iter(ON_A.items()))
    assert reload_weights(model, iter(ON_B.items())).tensors == len(ON_B)


def by_layers(model: nn.Module) -> None:
    open_layerwise(model)
    model.load_weights(iter(ON_B.items()))
    finish_layerwise(model)


def by_push(model: nn.Module) -> None:
    for item in ON_B.items():
        model.load_weights([item])
    utils.process_weights_after_loading(model, CONFIG, CPU)


@pytest.mark.parametrize("road", [by_stream, by_streaming, twice, by_layers, by_push])
def test_padded_heads_stay_without_weight(road: object) -> None:
    model, expected = cold(Sinking, ON_A), values(cold(Sinking, ON_B))
    before = identities(model)
    road(model)
    assert model.first.sinks[HEADS:].tolist() == [-float("inf")] * (PADDED - HEADS)
    assert values(model) == expected
    assert identities(model) == before


def test_a_sink_for_which_no_weight_comes_is_named() -> None:
    """Although its padding is there: it is told by what was written, not by what is not a number."""
    model = cold(Sinking, ON_A)
    before = values(model)
    with pytest.raises(MissingWeightsError, match="sinks"):
        reload_weights(model, iter(B.items()))
    assert values(model) == before
