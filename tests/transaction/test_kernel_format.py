"""Weights in kernel format: copied into the served tensors by exact name, shape and dtype, or not at all."""

import types
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import reload_plugin
from reload_plugin import errors
from reload_plugin.vllm_hooks import plugin


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    before = plugin.patched()
    plugin.register()
    yield
    if not before:
        plugin.unregister()


class Toy(nn.Module):
    """Two parameters and a buffer, which processing leaves as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("table", torch.zeros(5))


class Packed(Toy):
    """A toy whose processing hides a packed weight in a closure, as CPU kernels do."""

    def process_weights_after_loading(self) -> None:
        packed = self.weight.t().contiguous()
        self.kernel = lambda x: x @ packed


def served(kind: type[nn.Module] = Toy) -> nn.Module:
    """A recorded and processed model."""
    from vllm.model_executor.model_loader import utils

    model = kind()
    reload_plugin.record_for_reloading(model)
    config = types.SimpleNamespace(
        dtype=torch.float32,
        quantization=None,
        hf_config=types.SimpleNamespace(),
        word_embeddings_untied_by_checkpoint=False,
        model="",
    )
    utils.process_weights_after_loading(model, config, torch.device("cpu"))
    return model


def push(model: nn.Module, *weights: object) -> reload_plugin.ReloadReport:
    return reload_plugin.reload_weights(model, iter(weights), is_checkpoint_format=False)


def test_parameters_and_buffers_are_copied_in_place() -> None:
    model = served()
    objects = {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    new = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    report = push(model, *new.items())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor.data, new[name])
        assert (id(tensor), tensor.data_ptr()) == objects[name]
    assert (report.tensors, report.nbytes) == (3, sum(t.nbytes for t in new.values()))


def test_the_callers_buffer_may_be_reused() -> None:
    model, destinations = served(), torch.empty(12)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", destinations.fill_(7.0).view(3, 4)
        yield "bias", destinations[:3].fill_(8.0)
        destinations.fill_(9.0)

    reload_plugin.reload_weights(model, weights(), is_checkpoint_format=False)
    assert torch.equal(model.weight.data, torch.full((3, 4), 7.0))
    assert torch.equal(model.bias.data, torch.full((3,), 8.0))


@pytest.mark.parametrize(
    ("name", "tensor", "error"),
    [
        ("weight", torch.zeros(4, 3), errors.MisshapenWeightsError),
        ("weight", torch.zeros(1, 4), errors.MisshapenWeightsError),
        ("weight", torch.zeros(()), errors.MisshapenWeightsError),
        ("weight", torch.zeros(3, 4, dtype=torch.bfloat16), errors.MisshapenWeightsError),
        ("weight", torch.zeros(3, 4, device="meta"), errors.MisshapenWeightsError),
        ("weight", [0.0], errors.MisshapenWeightsError),
        ("nothing", torch.zeros(3, 4), errors.UnexpectedWeightsError),
        ("bias", torch.zeros(3), errors.DuplicateWeightsError),
    ],
)
def test_what_does_not_match_exactly_changes_nothing(name: str, tensor: object, error: type) -> None:
    model = served()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=name):
        push(model, ("bias", torch.full((3,), 5.0)), (name, tensor))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(errors.KernelFormatError, match="no tensors"):
        push(served())


def test_a_kernel_format_in_a_closure_is_refused() -> None:
    model = served(Packed)
    with pytest.raises(errors.KernelFormatError, match="closures or native handles"):
        push(model, ("weight", torch.zeros(3, 4)))
    assert torch.equal(model.weight.data, torch.arange(12.0).reshape(3, 4))


class FailingCopy(TorchDispatchMode):
    """The ``count``-th copy raises after it has written something; those after it work."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: object = None
    ) -> object:
        if func is torch.ops.aten.copy_.default:
            self.left -= 1
            if self.left == 0:
                args[0].fill_(-1)
                raise RuntimeError("the device is gone")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_copy_that_fails_half_way_is_undone(count: int) -> None:
    model = served()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = [(name, torch.randn_like(t)) for name, t in before.items()]
    with (
        pytest.raises(errors.ReloadError, match=r"the device is gone.*serves what it served before"),
        FailingCopy(count),
    ):
        push(model, *new)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    push(model, *new)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in new)
