"""Layers that processing passes over: their tensors stay as they are served while weights come."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader import utils
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import replace_parameter

from reload_plugin import ReloadSession, record_for_reloading, vllm_api
from reload_plugin.checkpoint import TensorInfo
from reload_plugin.device.host_memory import MemoryGauge
from reload_plugin.errors import SourceError
from reload_plugin.plan.checkpoint_plan import make_plan
from reload_plugin.plan.known_checkpoint import KnownCheckpoint
from reload_plugin.record import recorder as record_module
from reload_plugin.record import staged_group
from reload_plugin.record.construction_trace import ConstructionTrace
from reload_plugin.record.model_record import TensorRecord, record_of
from reload_plugin.record.recorder import record_constructed
from reload_plugin.record.staged_storage import StagedStorage
from reload_plugin.record.tensor_layout import SMALL_BYTES, Constant, Geometry, Initial, TensorFormat, Values
from reload_plugin.transaction.engine_state import state_of
from tests.transaction.test_session import CONFIG, CPU, registered  # noqa: F401 - the fixture is used by itself

Weights = dict[str, torch.Tensor]


class Method(QuantizeMethodBase):
    """Turns the weight round."""

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        layer.weight = nn.Parameter(torch.empty(4, 3), requires_grad=False)

    def apply(self, layer: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        return layer.weight.sum()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        replace_parameter(layer, "weight", layer.weight.data.t().contiguous())


class Linear(nn.Module):
    def __init__(self, method: QuantizeMethodBase | None = None) -> None:
        super().__init__()
        self.quant_method = Method() if method is None else method
        self.quant_method.create_weights(self)


class Norm(nn.Module):
    """A weight that has to come, a scale that may, and a table that nobody sends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("table", torch.arange(float(SMALL_BYTES)).sqrt(), persistent=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = Linear(), Norm()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            default_weight_loader(parameters[name], tensor)


class Computing(Model):
    """Its loader makes something else of the norm's weight."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights((name, -tensor if "norm" in name else tensor) for name, tensor in weights)


def weights(seed: int, *more: str) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"norm.weight": (5,), "linear.weight": (4, 3)} | dict.fromkeys(more, (5,))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


A, B = weights(1), weights(2)
BOTH = weights(3, "norm.scale")


def cold(checkpoint: Weights, kind: Callable[[], Model] = Model) -> Model:
    with (trace := ConstructionTrace()):
        model = kind()
    record_constructed(model, trace, None)
    model.load_weights(checkpoint.items())
    utils.process_weights_after_loading(model, CONFIG, CPU)
    return model


def values(model: nn.Module) -> dict[str, tuple[int, int, list[float]]]:
    """Object, address and values of every tensor."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: (id(t), t.data_ptr(), t.flatten().tolist()) for name, t in tensors}


def only_values(model: nn.Module) -> list[list[float]]:
    return [found for _, _, found in values(model).values()]


def planned(model: nn.Module, checkpoint: Weights) -> ReloadSession:
    """A session for weights that were listed before, committed layer by layer."""
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in checkpoint.items()]
    not_sent = KnownCheckpoint(was_written=lambda name: "none" if name == "norm.scale" else "whole")
    plan = make_plan(model, infos, "a folder", not_sent)
    known = KnownCheckpoint(plan.names_of_group, True, plan.copy_plan, not_sent.was_written)
    return ReloadSession(model, policy="streaming", expected=known)


def reload(model: nn.Module, checkpoint: Weights) -> None:
    with planned(model, checkpoint) as session:
        session.load_last(checkpoint.items())
        session.finish()


class Sharing(Model):
    """A layer that holds a buffer of another one's."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.router = nn.Module()
        self.router.register_buffer("bias", torch.ones(5), persistent=persistent)
        self.linear.register_buffer("bias", self.router.bias, persistent=persistent)


@pytest.mark.parametrize("saved", [False, True])
def test_layers_are_loaded_together_for_a_buffer_that_a_checkpoint_may_have(saved: bool) -> None:
    """Not for one that is computed, as the tables of rotary embeddings are."""
    groups = record_of(cold(A, lambda: Sharing(saved))).groups
    together = [group for group in groups if {"linear", "router"} <= {layer.name for layer in group.layers}]
    assert bool(together) is saved


# --- while weights are loaded ---


def test_layers_without_processing_keep_their_served_tensors_while_loading() -> None:
    model = cold(A)
    before, seen = values(model), []

    def looking() -> Iterator[tuple[str, torch.Tensor]]:
        seen.append((model.norm.weight.data_ptr(), model.norm.weight.tolist(), model.linear.weight.shape))
        yield from B.items()

    with planned(model, B) as session:
        session.load_last(looking())
        session.finish()
    assert seen == [(*before["norm.weight"][1:], (4, 3))]
    assert only_values(model) == only_values(cold(B))
    after = values(model)
    assert {name: found[:2] for name, found in after.items()} == {n: f[:2] for n, f in before.items()}


def test_layers_without_processing_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    plain = staged_group.read
    monkeypatch.setattr(staged_group, "read", lambda held, *now: read.append(held) or plain(held, *now))
    for kind, others in ((Model, False), (Computing, True)):
        model = cold(A, kind)
        with planned(model, B) as session:
            read.clear()
            session.load_last(B.items())
            session.finish()
        assert any(held is model.linear for held in read)
        assert any(held is model.norm for held in read) is others
        assert only_values(model) == only_values(cold(B, kind))


@pytest.mark.parametrize("name", ["weight", "table"])
def test_a_served_tensor_of_another_layout_is_staged(name: str) -> None:
    """Nor is its layer treated as one whose served tensors may be loaded directly."""
    model = cold(A)
    served = getattr(model.norm, name)
    served.data = served.data.repeat_interleave(2)[::2]
    reload(model, B)
    assert only_values(model) == only_values(cold(B))


def test_handles_that_the_caller_makes_between_weights_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Library:
        @staticmethod
        def make(_: torch.Tensor) -> int:
            return 7

    def making() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("norm.weight", "norm.scale", "linear.weight"):
            yield name, BOTH[name]
            Library.make(torch.ones(3))
            noted.append(dict(state_of(model).handles))

    noted: list[object] = []
    monkeypatch.setattr(vllm_api, "native_constructors", lambda: [(Library, "make", None)])
    model = cold(A)
    with planned(model, BOTH) as session:
        session.load_last(making())
        session.finish()
    assert noted == [{}] * 3


class Counting(Model):
    """Its loader leaves a note at a layer that has no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(weights)
        self.act.loads = getattr(self.act, "loads", 0) + 1


@pytest.mark.parametrize("policy", ["staged", "streaming"])
def test_attributes_that_a_loader_sets_on_a_layer_without_tensors_are_restored(policy: str) -> None:
    model = cold(BOTH, Counting)
    assert model.act.loads == 1
    with ReloadSession(model, policy=policy) as session:
        session.load({"norm.weight": B["norm.weight"]}.items())
    assert model.act.loads == 1


def test_a_layer_whose_weights_are_computed_is_staged() -> None:
    model = cold(A, Computing)
    place = model.norm.weight.data_ptr()
    with planned(model, B) as session:
        with session.loading():
            assert model.norm.weight.data_ptr() != place
        session.load_last(B.items())
        session.finish()
    assert only_values(model) == only_values(cold(B, Computing))


def test_a_weight_that_is_not_sent_again_gets_the_constructors_value() -> None:
    model = cold(A)
    reload(model, BOTH)
    assert model.norm.scale.tolist() != [1] * 5
    reload(model, B)
    assert only_values(model) == only_values(cold(B))


@pytest.fixture
def initialised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that were given the constructor's values."""
    found: list[str] = []
    initialise = StagedStorage._initialise

    def noting(storage: StagedStorage, record: TensorRecord, unwritten: bool) -> None:
        initialise(storage, record, unwritten)
        found.append(record.name)

    monkeypatch.setattr(StagedStorage, "_initialise", noting)
    return found


def test_a_buffer_without_a_weight_is_not_copied(initialised: list[str]) -> None:
    model = cold(A)
    with planned(model, B) as session:
        session.load_last(B.items())
        report = session.finish()
    assert "norm.scale" in initialised
    assert "norm.table" not in initialised
    assert report.staging_bytes == B["linear.weight"].nbytes


# --- failures ---


def failing(checkpoint: Weights, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, checkpoint[name]) for name in names)
    raise OSError("gone")


@pytest.mark.parametrize("names", [[], ["norm.weight"]])
def test_a_session_knows_whether_served_memory_was_written(names: list[str]) -> None:
    """Of a layer that waits for the rest of its weights, so that it was not processed either."""
    model = cold(A)
    before = values(model)
    with planned(model, BOTH) as session:
        with pytest.raises(SourceError, match="gone"):
            session.load_last(failing(BOTH, names))
        assert session.touched_groups == ({"norm"} if names else set())
    assert (values(model) == before) is not bool(names)
    reload(model, B)
    assert only_values(model) == only_values(cold(B))


def test_a_loader_that_gets_an_unplanned_weight_marks_the_group_touched() -> None:
    """A weight of another dtype than listed does not fit the copy plan, so the loader writes it."""
    model = cold(A)
    with planned(model, BOTH) as session:
        with pytest.raises(SourceError, match="gone"):
            session.load_last(failing({"norm.weight": B["norm.weight"].double()}, ["norm.weight"]))
        assert session.touched_groups == {"norm"}
    assert torch.equal(model.norm.weight, B["norm.weight"])
    reload(model, A)
    assert only_values(model) == only_values(cold(A))


def test_a_failing_initial_value_marks_the_group_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_to(storage: StagedStorage, record: TensorRecord, unwritten: bool) -> None:
        if record.name == "norm.scale":
            raise RuntimeError("no such kernel")

    model = cold(A)
    monkeypatch.setattr(StagedStorage, "_initialise", failing_to)
    with planned(model, {"linear.weight": B["linear.weight"]}) as session:
        session.load_last([("linear.weight", B["linear.weight"])])
        (staged,) = [staged for staged in session.parts.view.groups if staged.group.name == "norm"]
        with session.loading(), pytest.raises(RuntimeError, match="no such kernel"):
            session.parts.pipeline._close(staged)
        assert session.touched_groups == {"linear", "norm"}


def test_served_memory_is_never_freed() -> None:
    model = cold(A)
    before = values(model)
    with planned(model, B) as session:
        with session.loading():
            (staged,) = [staged for staged in session.parts.view.groups if staged.group.name == "norm"]
            assert all(storage.aliases_served for storage in staged.storages)
            staged.release(set())
        session.abort()
    assert values(model) == before


# --- small tensors ---


def staged(
    tensor: torch.Tensor, initial: Initial, from_served: bool = False
) -> tuple[StagedStorage, MemoryGauge]:
    geometry = Geometry.of(tensor)
    fmt = TensorFormat("t", geometry, tensor.dtype, CPU, torch.Tensor, False, {}, initial)
    record = TensorRecord(fmt, 0, lambda: tensor, False, "layer")  # type: ignore[arg-type]
    gauge = MemoryGauge()
    return StagedStorage([record], CPU, gauge, from_served=from_served), gauge


def test_a_tensor_smaller_than_its_description_has_its_value_at_once() -> None:
    initial = Values(torch.tensor(3.0))
    storage, gauge = staged(torch.tensor(4.0), initial)
    (view,) = storage.views.values()
    assert (storage.materialised, view.item(), gauge.peak) == (True, 3.0, 0)
    view.fill_(5)
    assert initial.tensor.item() == 3.0, "the record's own value was written to"
    storage.release()
    assert (storage.storage.nbytes(), gauge.held) == (0, 0)


@pytest.mark.parametrize(
    ("tensor", "initial", "from_served"),
    [
        (torch.ones(17), Values(torch.ones(17)), False),
        (torch.ones(2), Constant(1.0), False),
        (torch.ones(2), Values(torch.ones(2)), True),
        (torch.ones(4)[::2], Values(torch.ones(2)), False),
    ],
)
def test_larger_tensors_get_their_values_at_the_first_write(
    tensor: torch.Tensor, initial: Initial, from_served: bool
) -> None:
    storage, gauge = staged(tensor, initial, from_served)
    assert not storage.materialised
    storage.materialise()
    assert gauge.held == storage.nbytes > 0


# --- layers that go together ---


class OfAModule(nn.Module, Method):  # type: ignore[misc]
    """A method that is a module of its own and keeps what it makes."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self.total = float(layer.weight.sum())


class Attention(nn.Module):
    def __init__(self, parameter: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        if parameter:
            self.sinks = nn.Parameter(torch.ones(2))

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        self.scale.fill_(1)


def groups_of(make: Callable[[], nn.Module]) -> set[frozenset[str]]:
    """The names of layers that go together."""
    model = make()
    record_for_reloading(model, None)
    utils.process_weights_after_loading(model, CONFIG, CPU)
    record = record_of(model)
    assert record is not None
    return {frozenset(layer.name for layer in group.layers) for group in record.groups}


def test_a_quant_method_that_is_a_module_is_grouped_with_its_only_layer() -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.one, model.other = Linear(OfAModule()), Linear(OfAModule())
        return model

    found = groups_of(make)
    assert {frozenset(("one", "one.quant_method")), frozenset(("other", "other.quant_method"))} <= found


def test_a_quant_method_of_several_layers_is_grouped_with_none() -> None:
    def make() -> nn.Module:
        model, method = nn.Module(), OfAModule()
        model.one, model.other = Linear(method), Linear(method)
        return model

    assert not any({"one", "other"} <= found for found in groups_of(make))


def test_attention_without_parameters_is_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_attention(module: nn.Module) -> bool:
        return isinstance(module, Attention)

    monkeypatch.setattr(record_module.vllm_api, "is_deferred_attention_layer", is_attention)

    def make() -> nn.Module:
        model = nn.Module()
        model.a, model.b, model.c, model.d = (
            Attention(parameter) for parameter in (False, True, False, True)
        )
        return model

    found = groups_of(make)
    assert {frozenset("ac"), frozenset("b"), frozenset("d")} <= found
