"""vLLM's own weight offloaders: what the constructor put into memory that they replace; what is refused."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig

from reload_plugin.errors import UnsupportedError
from reload_plugin.record.construction_trace import ConstructionTrace
from reload_plugin.record.model_record import record_of
from reload_plugin.record.recorder import record_constructed
from reload_plugin.record.tensor_layout import Constant, Uninitialised
from reload_plugin.transaction.chunked_update import open_layerwise
from reload_plugin.transaction.reload import reload_weights
from tests.transaction.test_session import CONFIG, CPU, A, B, Method, Model, registered, utils, values  # noqa: F401 - a fixture among them


@pytest.fixture(scope="module")
def viewed() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Stands in for vLLM's operator, which needs a GPU."""
    library = torch.library.Library("reload_plugin_test", "DEF")
    library.define("get_cuda_view_from_cpu_tensor(Tensor cpu) -> Tensor")
    library.impl("get_cuda_view_from_cpu_tensor", lambda cpu: cpu.clone(), "CPU")
    yield torch.ops.reload_plugin_test.get_cuda_view_from_cpu_tensor
    library._destroy()


def test_weights_behind_a_view_of_host_memory_have_to_come_from_the_checkpoint(
    viewed: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    class Offloaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 3), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
            for parameter in self.parameters():
                parameter.data = viewed(parameter.data.to("cpu", copy=True))

    with (trace := ConstructionTrace()):
        model = Offloaded()
    record_constructed(model, trace, None)
    found = {tensor.name: tensor for layer in record_of(model).layers for tensor in layer.tensors}
    assert found["weight"].format.initial == Uninitialised()
    assert found["weight"].expected
    assert found["scale"].format.initial == Constant(1)


def model_with(group_size: int, backend: str = "auto") -> nn.Module:
    config = VllmConfig()
    config.load_config.load_format = "by the test"
    config.offload_config.prefetch.offload_group_size = group_size
    config.offload_config.offload_backend = backend
    model = Model(Method)
    record_constructed(model, None, config)
    model.load_weights(iter(A.items()))
    utils.process_weights_after_loading(model, CONFIG, CPU)
    return model


ROADS: dict[str, Callable[[nn.Module], object]] = {
    "reload": lambda model: reload_weights(model, iter(B.items())),
    "kernel format": lambda model: reload_weights(model, iter(B.items()), is_checkpoint_format=False),
    "update": open_layerwise,
    "live push": lambda model: model.load_weights(iter(B.items())),
}


@pytest.mark.parametrize("road", ROADS)
def test_prefetched_weights_are_refused(road: str) -> None:
    model = model_with(8)
    before = values(model)
    with pytest.raises(UnsupportedError, match=r"prefetch offloader.*cpu_offload_gb"):
        ROADS[road](model)
    assert values(model) == before


@pytest.mark.parametrize(("group_size", "backend"), [(0, "auto"), (8, "uva")])
@pytest.mark.parametrize("road", ROADS)
def test_others_are_reloaded(road: str, group_size: int, backend: str) -> None:
    ROADS[road](model_with(group_size, backend))
