"""Captured graphs: a reload leaves what they have baked in, or refuses; and values bound at the first pass.

A fake capture stands in for CUDA graphs: it notes the address of every tensor and every number that can be
reached from a model, as a graph bakes them in, and looks at them again.
"""

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from reload_plugin import vllm_api
from reload_plugin.digest.digest import digest_of
from reload_plugin.errors import UnsupportedError
from reload_plugin.record.model_record import record_of
from reload_plugin.record.module_state import holders_of, reachable
from reload_plugin.record.snapshot import read
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.reload import reload_weights
from tests.transaction.test_session import (  # noqa: F401 - a fixture among them
    A,
    B,
    Method,
    Model,
    Packing,
    cold,
    registered,
    start,
    values,
)


class Capture:
    """What a graph that was captured now would have baked in."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = [(path, tensor.data_ptr(), weakref.ref(tensor)) for path, tensor in _tensors(model)]
        self._numbers = dict(_numbers(model))

    def stale(self) -> list[str]:
        """What is not as it was: a tensor that is gone or moved, another number."""
        found = [
            path for path, address, ref in self._tensors if (t := ref()) is None or t.data_ptr() != address
        ]
        now = dict(_numbers(self._model))
        return found + [path for path, number in self._numbers.items() if now.get(path) != number]


def _held(model: nn.Module) -> Iterator[tuple[str, object]]:
    for name, module in model.named_modules():
        for path, holder in holders_of(module):
            for (_, key), value in read(holder).items():
                yield f"{name}.{path}.{key}", value


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, value in _held(model):
        found = [value] if isinstance(value, torch.Tensor) else reachable(value)
        yield from ((path, one) for one in found if isinstance(one, torch.Tensor) and one.numel())


def _numbers(model: nn.Module) -> Iterator[tuple[str, float]]:
    return ((path, v) for path, v in _held(model) if isinstance(v, (int, float)) and not isinstance(v, bool))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says that it captured graphs."""
    monkeypatch.setattr(vllm_api, "captures_graphs", lambda _: True)


class Scaling(Method):
    """Packs, with tensors alone: a graph sees new weights."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.scale = nn.Parameter(layer.weight.data.abs().amax(1, keepdim=True), requires_grad=False)
        layer.weight = nn.Parameter((layer.weight.data / layer.scale).t().contiguous(), requires_grad=False)


class Trimming(Method):
    """Its layout depends on the values."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        rows = int((layer.weight.data > 0).sum()) % 4
        layer.weight = nn.Parameter(layer.weight.data[: rows + 1].clone(), requires_grad=False)


class Native:
    """Owns memory that no tensor shows."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.packed = weight.clone()

    def __del__(self) -> None:
        """Releases it."""


class Owning(Method):
    """Keeps an owner of native memory of a kind that nobody knows."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.native = Native(layer.weight.data)


FITS = [Method, Scaling]
STALE = {"number": (Packing, "largest"), "address": (Trimming, "weight"), "native memory": (Owning, "Native")}


@pytest.mark.parametrize("policy", ["host", "streaming"])
@pytest.mark.parametrize("method", FITS)
def test_a_graph_sees_the_new_weights(graphs: None, method: type[Method], policy: str) -> None:
    model = start(Model, method)
    capture = Capture(model)
    reload_weights(model, iter(B.items()), policy=policy)
    assert capture.stale() == []
    assert values(model) == values(cold(lambda: Model(method), B))


@pytest.mark.parametrize("what", STALE)
def test_what_a_graph_could_not_see_is_refused_before_the_commit(graphs: None, what: str) -> None:
    method, name = STALE[what]
    model = start(Model, method)
    capture, before = Capture(model), values(model)
    with pytest.raises(UnsupportedError, match="CUDA graphs were captured") as caught:
        reload_weights(model, iter(B.items()), policy="host")
    assert f"({what})" in str(caught.value)
    assert name in str(caught.value)
    assert capture.stale() == []
    assert values(model) == before
    assert state_of(model).broken is None
    if what != "native memory":
        reload_weights(model, iter(A.items()), policy="host")
        assert capture.stale() == []


@pytest.mark.parametrize("what", STALE)
def test_without_graphs_nothing_of_that_is_refused(what: str) -> None:
    method, _ = STALE[what]
    model = start(Model, method)
    reload_weights(model, iter(B.items()))
    assert values(model) == values(cold(lambda: Model(method), B))


# --- what the first forward pass binds ---


class Kernel:
    """Made by processing, anew each time; its workspace belongs to the runtime."""

    def __init__(self, scale: float) -> None:
        self.scale = torch.tensor(scale)
        self.workspace: object = None
        self.bmm1_scale: float | None = None


class Attention:
    """Made with the layer, and stays."""

    def __init__(self) -> None:
        self.bmm1_scale: float | None = None
        self.handle: object = None


class Lazy(Method):
    def __init__(self) -> None:
        self.attention = Attention()
        self._combined_gate_weight: torch.Tensor | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.kernel = Kernel(float(layer.weight.sum()))
        layer.kernel.source = layer.weight

    def first_pass(self, layer: nn.Module) -> None:
        """What vLLM does when these are None."""
        kernel = layer.kernel
        for one in (kernel, self.attention):
            if one.bmm1_scale is None:
                one.bmm1_scale = float(kernel.scale) * 2
        kernel.workspace = kernel.workspace or object()
        self.attention.handle = self.attention.handle or object()
        self.kernel = kernel
        self._maybe_fuse_gate_weights()

    def _maybe_fuse_gate_weights(self) -> None:
        if self._combined_gate_weight is None:
            self._combined_gate_weight = torch.cat([self.kernel.source, self.kernel.source])


def lazy_model() -> nn.Module:
    model = start(Model, Lazy)
    for layer in (model.first, model.lm_head):
        layer.quant_method.first_pass(layer)
    return model


def test_objects_of_the_runtime_stay_and_values_made_of_weights_follow() -> None:
    model = lazy_model()
    layer = model.first
    kernel, method = layer.kernel, layer.quant_method
    kept = kernel.workspace, method.attention.handle, method._combined_gate_weight
    address, old = kept[2].data_ptr(), kernel.bmm1_scale
    reload_weights(model, iter(B.items()))
    assert layer.kernel is kernel
    assert (kernel.workspace, method.attention.handle) == kept[:2]
    assert kernel.bmm1_scale is None
    assert method.attention.bmm1_scale is None
    assert method._combined_gate_weight is kept[2]
    assert kept[2].data_ptr() == address
    assert torch.equal(kept[2], torch.cat([B["first.weight"]] * 2))
    method.first_pass(layer)
    assert kernel.bmm1_scale == method.attention.bmm1_scale == float(B["first.weight"].sum()) * 2 != old


def test_a_tensor_that_nothing_makes_anew_is_refused_under_graphs(graphs: None) -> None:
    class Stable(Model):
        _stable_full_lm_head_weight: torch.Tensor | None = None

        def __init__(self) -> None:
            super().__init__(Method)
            self._stable_full_lm_head_weight = None

    model = start(Stable)
    model._stable_full_lm_head_weight = model.lm_head.weight.data.clone()
    before = values(model)
    for road in (iter, lambda items: iter({"first.weight": dict(items)["first.weight"]}.items())):
        with pytest.raises(UnsupportedError, match="_stable_full_lm_head_weight"):
            reload_weights(model, road(B.items()), is_checkpoint_format=road is iter)
        assert values(model) == before


class Sometimes(Method):
    """Makes a tensor of some weights and not of others."""

    def __init__(self) -> None:
        self.offset: torch.Tensor | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.offset = layer.weight.data[0].clone() if layer.weight.data[0, 0] > 0 else None


def test_what_processing_makes_of_some_weights_goes_with_others() -> None:
    """The start leaves it None, as it does what the first pass sets."""
    without, with_it = ({n: torch.full((4, 3), value) for n in A} for value in (-1.0, 1.0))
    model = cold(lambda: Model(Sometimes), without)
    for weights in (with_it, without, with_it):
        reload_weights(model, iter(weights.items()))
        assert values(model) == values(cold(lambda: Model(Sometimes), weights))


def test_the_digest_is_of_weights_and_not_of_what_has_run() -> None:
    ran, fresh = lazy_model(), start(Model, Lazy)
    reports = [reload_weights(model, iter(B.items())) for model in (ran, fresh)]
    assert reports[0].digest == reports[1].digest is not None
    ran.first.quant_method.first_pass(ran.first)
    assert digest_of(record_of(ran), state_of(ran).handles) == reports[0].digest
