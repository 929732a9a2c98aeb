"""The whole line on small models, with vLLM's own processing and without an engine."""

import gc
import itertools
import os
import signal
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader import utils
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from reload_plugin import ReloadSession, record_for_reloading, reload_weights, restore_for_reloading, vllm_api
from reload_plugin.checkpoint import TensorInfo
from reload_plugin.commit.group_commit import Commit
from reload_plugin.device import output_reuse as results
from reload_plugin.device.cpu import CpuOps
from reload_plugin.device.host_memory import MemoryGauge
from reload_plugin.digest import digest
from reload_plugin.errors import (
    DuplicateWeightsError,
    EngineBrokenError,
    LateReadError,
    LateWriteError,
    MisshapenWeightsError,
    MissingWeightsError,
    NotRecordedError,
    ProcessingError,
    ReloadError,
    SessionError,
    SourceError,
    UnexpectedWeightsError,
    WeightsError,
)
from reload_plugin.plan.known_checkpoint import KnownCheckpoint
from reload_plugin.process import native_handles as native
from reload_plugin.record import staged_storage
from reload_plugin.record.construction_trace import ConstructionTrace
from reload_plugin.record.model_record import record_of
from reload_plugin.record.module_state import holders_of, tensors_in
from reload_plugin.record.recorder import record_constructed
from reload_plugin.record.snapshot import read
from reload_plugin.record.staged_group import StagedGroup
from reload_plugin.record.staged_storage import POISON
from reload_plugin.tensors import storage_id
from reload_plugin.transaction import heap_budget
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.known import plan_listing
from reload_plugin.vllm_hooks import plugin

CONFIG = types.SimpleNamespace(
    dtype=torch.float32,
    quantization=None,
    hf_config=types.SimpleNamespace(tie_word_embeddings=True),
    word_embeddings_untied_by_checkpoint=False,
    model="",
)
CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The plugin, taken out again unless somebody had registered it before."""
    before = plugin.patched()
    plugin.register()
    assert plugin.patched(), "the plugin did not register, so nothing here would be tested"
    yield
    if not before:
        plugin.unregister()


# --- layers of several kinds ---


class Method(QuantizeMethodBase):
    """A method without processing; the base of those below."""

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        weight = nn.Parameter(torch.empty(4, 3), requires_grad=False)
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        return layer.weight.sum()


class Packing(Method):
    """Replaces the weight by another layout, adds a scale, and keeps a number and a closure."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight = layer.weight.data
        scale = weight.abs().amax(1, keepdim=True)
        replace_parameter(layer, "weight", (weight / scale).t().contiguous())
        layer.register_parameter("scale", nn.Parameter(scale, requires_grad=False))
        self.largest = float(scale.max())
        packed = layer.weight
        layer.run = lambda: packed.sum() * self.largest


class Crossing(Method):
    """Asks for the memory of two results of one shape in the other order than it served them in."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        doubled, halved = torch.empty_like(layer.weight), torch.empty_like(layer.weight)
        doubled.copy_(layer.weight.data * 2)
        halved.copy_(layer.weight.data / 2)
        replace_parameter(layer, "weight", halved)
        layer.doubled = doubled


class Shrinking(Method):
    """Packs into memory like the weight's, as the CPU's experts do, and may fail afterwards."""

    fails = False

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        result = torch.empty_like(layer.weight)
        replace_parameter(layer, "weight", result.copy_(layer.weight.data / 2))
        if self.fails:
            raise RuntimeError("after packing")


class Sketching(Method):
    """Asks for memory like the weight's for something it throws away, and then for its result."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        sketch = torch.empty_like(layer.weight).fill_(7)
        result = torch.empty_like(layer.weight)
        replace_parameter(layer, "weight", result.copy_(layer.weight.data + sketch))


class Smudging(Method):
    """Leaves the weight where it is, changed, and asks for memory like the weight's meanwhile."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        sketch = torch.empty_like(layer.weight).fill_(7)
        layer.weight.data.add_(sketch)


class Deleting(Method):
    """Takes the weight away and keeps what it became in a plain attribute."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = layer.weight.data.flip(0)
        del layer.weight


class Renaming(Method):
    """Puts what the weight became into a parameter of another name."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = nn.Parameter(layer.weight.data * 2, requires_grad=False)
        del layer.weight


class Kernel:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.total = weight, float(weight.sum())


class Helping(Method):
    """Hands the parameter to a kernel object that it makes anew each time."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data * 2
        layer.kernel = Kernel(layer.weight)


class HelpedFromTheStart(Method):
    """The helper holds the parameter already when it is created, as quant configs hold biases."""

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        super().create_weights(layer)
        layer.kernel = types.SimpleNamespace(bias=layer.weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data.t().contiguous()


class Padding(Method):
    """More rows than the checkpoint has, and scales that a checkpoint need not have."""

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        weight = nn.Parameter(torch.zeros(6, 3), requires_grad=False)
        set_weight_attrs(weight, {"weight_loader": lambda p, loaded: p.data[: len(loaded)].copy_(loaded)})
        layer.register_parameter("weight", weight)
        layer.register_parameter("scale", nn.Parameter(torch.ones(6), requires_grad=False))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        replace_parameter(layer, "weight", layer.weight.data * layer.scale.data[:, None] + 1)
        layer.scale.data = layer.scale.data * 5


class Online(Method):
    """Weights on meta, processed while a cold start is still loading."""

    uses_meta_device = True

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        weight = nn.Parameter(torch.empty(4, 3, device="meta"), requires_grad=False)
        set_weight_attrs(weight, {"weight_loader": default_weight_loader})
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if getattr(layer, "already", False):
            return
        replace_parameter(layer, "weight", (layer.weight.data * 10).round().to(torch.int8))
        layer.already = True


class Layer(nn.Module):
    def __init__(self, method: QuantizeMethodBase) -> None:
        super().__init__()
        self.quant_method = method
        method.create_weights(self)


METHODS = [
    Method,
    Packing,
    Shrinking,
    Crossing,
    Sketching,
    Smudging,
    Deleting,
    Renaming,
    Helping,
    HelpedFromTheStart,
    Padding,
    Online,
]


class Model(nn.Module):
    """Two layers of a method, and the loader most of vLLM's models have."""

    def __init__(self, method: type[QuantizeMethodBase] = Packing) -> None:
        super().__init__()
        self.first = Layer(method())
        self.lm_head = Layer(method())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            loaded.add(name)
        return loaded


class Tied(Model):
    """The head is the embedding."""

    def __init__(self, method: type[QuantizeMethodBase] = Method) -> None:
        super().__init__(method)
        self.lm_head.weight = self.first.weight

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((n, t) for n, t in weights if not n.startswith("lm_head"))


class ViewedByAnother(Model):
    """One layer has a buffer that is a view of another layer's parameter, as Mamba's mixers do."""

    def __init__(self) -> None:
        super().__init__(Method)
        view = self.first.weight.data.view(2, 2, 3)
        self.lm_head.register_buffer("table", view, persistent=False)


class Hooked(Model):
    """The model itself has something to do at the end, from all layers' final values."""

    def process_weights_after_loading(self) -> None:
        self.total = float(self.first.weight.sum() + self.lm_head.weight.sum())
        self.joined = torch.cat([self.first.weight.data, self.lm_head.weight.data])


def weights(seed: int, rows: int = 4) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, 3, generator=generator) for name in ("first.weight", "lm_head.weight")}


class Meddling(Model):
    """A third layer, whose loader uses the first one again, which is complete by then."""

    def __init__(self, method: type[QuantizeMethodBase] = Packing) -> None:
        super().__init__(method)
        self.last = Layer(method())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def meddling() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                yield name, tensor
                if name == "last.weight":
                    self.first.weight.data.copy_(tensor)

        return super().load_weights(meddling())


class Twice(Model):
    """Two names for one matrix, as of an embedding and a head that are tied."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name.replace("old_head", "lm_head"), tensor) for name, tensor in weights)


class Growing(Model):
    """Its loader makes a bias for the first layer when one comes, as vLLM's Transformers backend does."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def growing() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name != "first.bias":
                    yield name, tensor
                    continue
                self.first.bias = nn.Parameter(torch.empty(4), requires_grad=False)
                self.first.bias.data.copy_(tensor)

        return super().load_weights(growing())


class Deriving(Model):
    """A third layer, whose weight the loader takes from the first one when all have come, as vLLM's
    BertForMaskedLM takes its head from the embeddings.
    """

    def __init__(self, method: type[QuantizeMethodBase] = Packing) -> None:
        super().__init__(method)
        self.last = Layer(method())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        first, last = (next(layer.parameters()).data for layer in (self.first, self.last))
        last.copy_(first[:4] * 2)
        return loaded


A, B = weights(1), weights(2)
Make = Callable[[], nn.Module]


def cold(make: Make, checkpoint: Weights, trace: bool = False) -> nn.Module:
    """A model started on a checkpoint, as vLLM's loader starts it.

    With ``trace`` its construction is watched, as when vLLM builds it; without, it is recorded by hand.
    """
    watch = ConstructionTrace()
    if trace:
        with watch:
            model = make()
        record_constructed(model, watch, None)
    else:
        model = make()
        record_for_reloading(model, None)
    model.load_weights(iter(checkpoint.items()))
    utils.process_weights_after_loading(model, CONFIG, CPU)
    return model


def start(kind: type[Model] = Model, *arguments: object) -> nn.Module:
    return cold(lambda: kind(*arguments), A)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_two_weights_for_one_place_the_last_of_a_cold_start_is_there(
    order: tuple[int, ...], known: bool
) -> None:
    both = {"first.weight": B["first.weight"], "lm_head.weight": A["lm_head.weight"]}
    both["old_head.weight"] = B["lm_head.weight"]
    model, expected = start(Twice, Method), values(cold(lambda: Twice(Method), both))
    if known:
        reload_weights(model, iter(both.items()), whole_model=True)
        assert reload(model, both).replayed == 3
        assert reload(model, A).replayed == 2, "of the two one may be missing"
        assert values(model) == values(start(Twice, Method))
    shuffled = iter([list(both.items())[number] for number in order])
    reload_weights(model, shuffled, whole_model=not known)
    assert values(model) == expected


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("policy", ["staged", "streaming"])
@pytest.mark.parametrize("method", [Method, Packing, Renaming])
def test_a_loader_that_reads_values_again_finds_those_that_were_loaded(
    method: type[QuantizeMethodBase], policy: str, planned: bool, calls: int
) -> None:
    """Or nothing is loaded: where nobody knew before the first time, and then it is known for the next."""
    model, expected = start(Deriving, method), values(cold(lambda: Deriving(method), B))
    served, ids, brought = values(model), identities(model), list(B.items())
    if planned:
        infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in A.items()]
        plan_listing(model, state_of(model), infos, "A", None)

    def in_calls(session: ReloadSession) -> None:
        for first in range(0, 2, 2 // calls):
            session.load(brought[first : first + 2 // calls])

    in_the_way = not planned and calls == 1 and method is not Method  # whose layers are one group
    if in_the_way:
        with ReloadSession(model, policy=policy) as session:
            with pytest.raises(LateReadError, match=r"looked at first\.\w+, which is complete"):
                in_calls(session)
            with pytest.raises(SessionError, match="came back to a layer that was complete"):
                session.finish()
        if policy == "staged":
            assert (values(model), identities(model)) == (served, ids)
    with ReloadSession(model, policy=policy) as session:
        in_calls(session)
        session.finish()
    assert values(model) == expected
    if policy == "staged":
        assert {path: found for path, found in identities(model).items() if path in ids} == ids


@pytest.mark.parametrize("policy", ["staged", "streaming"])
@pytest.mark.parametrize("method", [Method, Packing])
def test_a_value_from_neither_checkpoint_nor_constructor_is_kept(
    monkeypatch: pytest.MonkeyPatch, method: type[QuantizeMethodBase], policy: str
) -> None:
    """A head that a classifier inherits and does not use, as in vLLM's JambaForSequenceClassification."""
    monkeypatch.setenv(POISON, "1")
    sent = {"first.weight": B["first.weight"]}
    model = cold(lambda: Model(method), A, trace=True)
    expected = values(cold(lambda: Model(method), A | sent))
    kept = KnownCheckpoint(was_written=lambda name: "none" if name == "lm_head.weight" else "whole")
    with ReloadSession(model, policy=policy, expected=kept) as session:
        session.load(sent.items())
        assert list(session.finish().kept) == ["lm_head.weight"]
    found = [values(model), expected]
    if method is Packing:  # its weight is not there any more in the form it came in
        found = [{path: one[path] for path in one if "first" in path} for one in found]
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", ["staged", "streaming"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_parameter_that_a_loader_makes_may_come_at_any_time(order: tuple[int, ...], policy: str) -> None:
    a, b = A | {"first.bias": torch.ones(4)}, B | {"first.bias": torch.arange(4.0)}
    model, expected = cold(Growing, a), values(cold(Growing, b))
    ids = identities(model)
    with ReloadSession(model, policy=policy) as session:
        for number in order:
            session.load([list(b.items())[number]])
        session.finish()
    assert values(model) == expected
    assert {path: ids[path] for path in ids if "bias" in path} == {
        path: found for path, found in identities(model).items() if "bias" in path
    }


@pytest.mark.parametrize("before", [0, 2], ids=["at once", "in pieces"])
def test_a_parameter_that_is_made_for_a_layer_that_is_complete_is_refused(before: int) -> None:
    """The start had none, so nobody could know that one would come. ``before``: weights that came before."""
    model = start(Growing)
    served, ids = values(model), identities(model)
    late = [*B.items(), ("first.bias", torch.ones(4))]
    with ReloadSession(model) as session:
        for number in range(before):
            session.load(late[number : number + 1])
        with pytest.raises(LateWriteError, match="wrote to first, which is complete"):
            session.load(late[before:])
        assert values(model) == served
        with pytest.raises(SessionError, match="came back to a layer that was complete"):
            session.finish()
    assert (values(model), identities(model)) == (served, ids)
    whole = reload_weights(model, iter(late), whole_model=True)
    assert whole.tensors == 3
    assert torch.equal(model.first.bias, torch.ones(4))


# --- what a model is ---


def plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        bits = bytes(value.detach().contiguous().view(-1).view(torch.uint8).tolist())
        return type(value).__name__, tuple(value.shape), value.stride(), value.dtype, bits
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def values(model: nn.Module) -> dict[str, object]:
    """Everything a model serves: every tensor's bits and every plain value, by path."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for path, holder in holders_of(module):
            for (_, key), value in read(holder).items():
                where = f"{name}/{path}.{key}"
                found[where] = plain(value)
                inside = [plain(t) for t in tensors_in(value)]
                found[where + "()"] = inside
    return found


def identities(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Objects and addresses of every tensor a model serves, by path."""
    found = {}
    for name, module in model.named_modules():
        for path, holder in holders_of(module):
            for (_, key), value in read(holder).items():
                for index, tensor in enumerate(tensors_in(value)):
                    found[f"{name}/{path}.{key}.{index}"] = (id(tensor), tensor.data_ptr())
    return found


def reload(model: nn.Module, checkpoint: Weights) -> Any:
    return reload_weights(model, iter(checkpoint.items()))


KINDS: dict[str, Make] = {method.__name__: (lambda m=method: Model(m)) for method in METHODS}
KINDS |= {"Tied": Tied, "TiedHelping": lambda: Tied(Helping)}
KINDS |= {"ViewedByAnother": ViewedByAnother, "Hooked": Hooked}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("policy", ["staged", "streaming"])
@pytest.mark.parametrize("method", [Packing, Shrinking])
def test_a_loader_that_writes_to_a_complete_layer_is_refused(
    method: type[QuantizeMethodBase], policy: str
) -> None:
    old, new = A | {"last.weight": A["first.weight"]}, B | {"last.weight": A["lm_head.weight"]}
    model = cold(lambda: Meddling(method), old)
    served = old if policy == "staged" else new | {"last.weight": B["first.weight"]}
    expected = values(cold(lambda: Meddling(method), served))
    with ReloadSession(model, policy=policy) as session, pytest.raises(LateWriteError, match="to first"):
        session.load(new.items())
    now = values(model)
    assert {name: now[name] for name in now if "first" in name} == {
        name: expected[name] for name in expected if "first" in name
    }


@pytest.mark.parametrize("passing", [0.5, 3, 5], ids="{} layers may pass".format)
@pytest.mark.parametrize("policy", ["staged", "streaming"])
def test_every_layer_is_processed_within_what_may_be_taken_beside_the_largest_and_what_is_prepared(
    monkeypatch: pytest.MonkeyPatch, policy: str, passing: float
) -> None:
    """What processing takes for a moment counts as four times the layer, to ``PROCESSING_BYTES``, or as the
    layer.
    """
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(heap_budget, "keep_within", lambda *found: asked.append(found))
    monkeypatch.setattr(heap_budget, "UNCHECKED_BYTES", 1)
    monkeypatch.setattr(heap_budget.growth, "begin", lambda: 5_000_000)
    model = cold(lambda: Model(Packing), A)
    record = record_of(model)
    sizes = [group.nbytes for group in record.groups if not group.plain and group.nbytes]
    most = int(passing * min(sizes))
    monkeypatch.setattr(heap_budget, "PROCESSING_BYTES", most)
    with ReloadSession(model, policy=policy) as session:
        session.load(B.items())
        session.finish()
    assert len(asked) == len(sizes) > 1
    assert sorted(needed for _, needed in asked) == sorted(max(n, min(4 * n, most)) for n in sizes)
    prepared = [limit - record.largest - heap_budget.HEAP_BUDGET - 5_000_000 for limit, _ in asked]
    done = itertools.accumulate([0, *sizes[:-1]])
    assert prepared == (list(done) if policy == "staged" else [0] * len(asked))


class Three(Model):
    def __init__(self) -> None:
        super().__init__(Packing)
        self.more = Layer(Packing())


@pytest.mark.parametrize(("layers", "looks"), [(0.5, 3), (1, 3), (1.5, 1), (2, 1), (3, 1), (3.5, 0)])
def test_small_layers_are_inspected_together(
    monkeypatch: pytest.MonkeyPatch, layers: float, looks: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(heap_budget, "keep_within", lambda *_: asked.append(1))
    model = cold(Three, A | {"more.weight": A["first.weight"]})
    (size,) = {group.nbytes for group in record_of(model).groups if not group.plain and group.nbytes}
    monkeypatch.setattr(heap_budget, "UNCHECKED_BYTES", layers * size)
    with ReloadSession(model) as session:
        session.load((B | {"more.weight": B["first.weight"]}).items())
        session.finish()
    assert len(asked) == looks


@every_kind
def test_what_a_group_serves_is_known_before_while_and_after_it_is_staged(make: Make) -> None:
    model = cold(make, A)
    for group in record_of(model).groups:
        staged = StagedGroup(group, CPU, frozenset(), MemoryGauge())

        def served(staged: StagedGroup = staged) -> set[int | None]:
            return {storage_id(tensor) for _, tensor in staged.served_tensors()}

        before = served()
        staged.enter()
        keys = {storage.key for storage in staged.storages}
        assert served() - keys == before
        staged.served.show()
        staged.drop()
        assert served() == before
        held = group.layers[0].ref().parameters(recurse=False)
        assert {storage_id(parameter) for parameter in held} <= before


@pytest.mark.parametrize("trace", [False, True], ids=["recorded by hand", "watched"])
@every_kind
def test_warm_equals_cold(make: Make, trace: bool) -> None:
    model = cold(make, A, trace)
    before = identities(model)
    assert values(model) != values(cold(make, B, trace)), "the weights change nothing, so this could not fail"
    for checkpoint in (B, A, A, B):
        reload(model, checkpoint)
        assert values(model) == values(cold(make, checkpoint, trace))
        assert identities(model) == before


@pytest.mark.parametrize("order", list(itertools.permutations(["first.weight", "lm_head.weight"])))
@pytest.mark.parametrize("policy", ["staged", "streaming"])
@every_kind
def test_any_order_and_either_policy_give_the_same(make: Make, order: tuple[str, ...], policy: str) -> None:
    model = cold(make, A)
    with ReloadSession(model, policy=policy) as session:
        session.load((name, B[name]) for name in order)
        session.finish()
    assert values(model) == values(cold(make, B))


@every_kind
def test_a_reload_in_pieces_serves_the_old_weights_in_between(make: Make) -> None:
    model = cold(make, A)
    old = values(model)
    with ReloadSession(model) as session:
        for name, tensor in B.items():
            session.load([(name, tensor)])
            assert values(model) == old
        session.finish()
    assert values(model) == values(cold(make, B))


@every_kind
def test_the_models_own_loader_reloads_inside_the_block(make: Make) -> None:
    model = cold(make, A)
    before = identities(model)
    with restore_for_reloading(model):
        for name, tensor in B.items():
            model.load_weights([(name, tensor)])
    assert values(model) == values(cold(make, B))
    assert identities(model) == before


def test_a_buffer_of_the_caller_may_be_used_again_for_the_next_weight() -> None:
    def reusing(checkpoint: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(4, 3)
        for name, tensor in checkpoint.items():
            buffer.copy_(tensor)
            yield name, buffer
            buffer.fill_(float("nan"))

    model = start()
    for checkpoint in (B, A, B):
        reload_weights(model, reusing(checkpoint))
        assert values(model) == values(cold(Model, checkpoint))


# --- the constructor's values ---


@pytest.mark.parametrize("trace", [False, True], ids=["recorded by hand", "watched"])
def test_padding_and_scales_come_from_the_constructor_every_time(
    trace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POISON, "1")
    model = cold(lambda: Model(Padding), A, trace)
    for checkpoint in (B, A):
        reload(model, checkpoint)
        assert torch.equal(model.first.weight[4:], torch.ones(2, 3))
        assert torch.equal(model.first.scale, torch.full((6,), 5.0))


def test_the_report_names_parameters_that_kept_the_constructors_value() -> None:
    report = reload(start(Model, Padding), B)
    assert report.kept == dict.fromkeys(("first.scale", "lm_head.scale"), "the constructor's value")


def test_a_forgotten_weight_shows_as_nan_under_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POISON, "1")
    model = cold(Model, A, trace=True)
    with ReloadSession(model) as session:
        session.load([("first.weight", B["first.weight"])])
        with pytest.raises(MissingWeightsError, match=r"lm_head\.weight"):
            session.finish()
        session.finish(check=False)
    assert torch.equal(model.first.weight, cold(Model, B).first.weight)
    assert model.lm_head.weight.isnan().all()
    assert model.lm_head.scale.isnan().all()


# --- states of a session ---


def session_at(model: nn.Module, state: str) -> ReloadSession:
    """A session that has come as far as ``state``."""
    session = ReloadSession(model)
    if state == "ready":
        return session
    session.open()
    if state == "open":
        return session
    if state == "aborted":
        session.abort()
        return session
    session.load(B.items())
    session.finish()
    return session


CALLS: dict[str, Callable[[ReloadSession], object]] = {
    "open": lambda session: session.open(),
    "load": lambda session: session.load([]),
    "finish": lambda session: session.finish(),
    "take_over": lambda session: session.take_over(),
}
ALLOWED = {("ready", "open"), ("open", "load"), ("open", "take_over"), ("open", "finish")}


REFUSED = sorted(set(itertools.product(["ready", "open", "committed", "aborted"], CALLS)) - ALLOWED)


@pytest.mark.parametrize(("state", "call"), REFUSED)
def test_a_call_in_the_wrong_state_is_a_session_error_and_changes_nothing(state: str, call: str) -> None:
    model = start()
    session = session_at(model, state)
    before, ids = values(model), identities(model)
    with pytest.raises(SessionError, match=state):
        CALLS[call](session)
    assert session.state.value == state
    assert values(model) == before
    assert identities(model) == ids


def test_states_follow_one_another() -> None:
    model = start()
    session = ReloadSession(model)
    seen = [session.state.value]

    def watching() -> Iterator[tuple[str, torch.Tensor]]:
        for pair in B.items():
            seen.append(session.state.value)
            yield pair

    with session:
        seen.append(session.state.value)
        session.load(watching())
        seen.append(session.state.value)
        session.finish()
        seen.append(session.state.value)
    assert seen == ["ready", "open", "loading", "loading", "open", "committed"]
    session.abort()
    assert session.state.value == "committed"


def test_a_model_without_a_record_is_refused() -> None:
    with pytest.raises(NotRecordedError, match="record_for_reloading"):
        reload(Model(), B)


def test_a_model_that_was_never_processed_is_refused() -> None:
    model = Model()
    record_for_reloading(model, None)
    with pytest.raises(NotRecordedError):
        reload(model, B)


# --- the model's own hook ---


def test_the_models_hook_sees_every_new_layer() -> None:
    model = start(Hooked)
    reload(model, B)
    assert model.total == float(model.first.weight.sum() + model.lm_head.weight.sum())
    assert model.total == cold(Hooked, B).total
    assert "process_weights_after_loading" not in model.__dict__


# --- failures ---


class BadSourceError(Exception):
    pass


def stopping(error: BaseException) -> Iterator[tuple[str, torch.Tensor]]:
    yield "first.weight", B["first.weight"]
    raise error


def changed(name: str, value: object) -> Iterator[tuple[str, object]]:
    return iter((B | {name: value}).items())


WRONG: dict[str, tuple[type[BaseException], Callable[[], Iterable]]] = {
    "nothing": (SourceError, lambda: iter(())),
    "no iterable": (SourceError, lambda: 3),
    "no pairs": (SourceError, lambda: iter([1, 2])),
    "source raises": (SourceError, lambda: stopping(BadSourceError("disk"))),
    "Ctrl-C": (KeyboardInterrupt, lambda: stopping(KeyboardInterrupt())),
    "missing": (MissingWeightsError, lambda: [("first.weight", B["first.weight"])]),
    "unexpected": (UnexpectedWeightsError, lambda: changed("third.weight", torch.zeros(2))),
    "duplicate": (DuplicateWeightsError, lambda: [*B.items(), *B.items()]),
    "too large": (WeightsError, lambda: changed("lm_head.weight", torch.zeros(5, 3))),
    "too small": (WeightsError, lambda: changed("lm_head.weight", torch.zeros(1, 3))),
    "no tensor": (WeightsError, lambda: changed("lm_head.weight", "a string")),
    "no values": (WeightsError, lambda: changed("lm_head.weight", torch.empty(4, 3, device="meta"))),
    "several": (WeightsError, lambda: [("third", torch.zeros(1)), ("first.weight", torch.zeros(9))]),
}


@pytest.mark.parametrize(
    "value", [torch.zeros(5, 3), torch.zeros(1, 3), "a string"], ids=["large", "small", "str"]
)
def test_a_weight_that_came_but_does_not_fit_is_not_missing_once_its_place_is_known(value: object) -> None:
    model = start()
    reload(model, A)
    with pytest.raises(MisshapenWeightsError) as caught:
        reload_weights(model, changed("lm_head.weight", value))
    assert list(caught.value.misshapen) == ["lm_head.weight"]


def check_unharmed(model: nn.Module, make: Make, before: dict, ids: dict) -> None:
    """The model is bit for bit what it was, and the next good reload works."""
    assert values(model) == before
    assert identities(model) == ids
    reload(model, B)
    assert values(model) == values(cold(make, B))
    assert identities(model) == ids


@pytest.mark.parametrize("warm", [False, True], ids=["first reload", "later reload"])
@pytest.mark.parametrize(("expected", "source"), WRONG.values(), ids=WRONG)
def test_weights_that_do_not_fit_change_nothing(expected: type, source: Callable, warm: bool) -> None:
    model = cold(Model, A, trace=True)
    if warm:
        reload(model, A)
    before, ids = values(model), identities(model)
    with pytest.raises(expected):
        reload_weights(model, source())
    check_unharmed(model, Model, before, ids)


@pytest.mark.parametrize(("expected", "source"), WRONG.values(), ids=WRONG)
def test_a_block_that_fails_changes_nothing(expected: type, source: Callable) -> None:
    model = cold(Model, A, trace=True)
    before, ids = values(model), identities(model)
    load_weights = model.load_weights
    with pytest.raises(expected), restore_for_reloading(model):
        model.load_weights(source())
    assert model.load_weights is load_weights
    check_unharmed(model, Model, before, ids)


def test_an_exception_of_the_callers_goes_through_the_block_and_changes_nothing() -> None:
    model = start()
    before, ids = values(model), identities(model)
    with pytest.raises(BadSourceError), restore_for_reloading(model):
        raise BadSourceError(len(model.load_weights(B.items())))
    check_unharmed(model, Model, before, ids)


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException) -> None:
    """Let the second call of a function fail; the context puts the function back."""
    original, calls = getattr(owner, name), []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    "error", [BadSourceError("bad"), MemoryError("no memory"), KeyboardInterrupt()], ids=repr
)
def test_processing_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    model = start()
    before, ids = values(model), identities(model)
    expected = ProcessingError if isinstance(error, Exception) else KeyboardInterrupt
    with monkeypatch.context() as patch:
        failing_once(patch, Packing, "process_weights_after_loading", error)
        with pytest.raises(expected) as caught:
            reload(model, B)
    assert caught.value is error or caught.value.__cause__ is error
    check_unharmed(model, Model, before, ids)


def test_a_hook_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = start(Hooked)
    before, ids = values(model), identities(model)

    def failing(self: nn.Module) -> None:
        self.total = None
        self.extra = 1
        raise BadSourceError("bad")

    with monkeypatch.context() as patch:
        patch.setattr(Hooked, "process_weights_after_loading", failing)
        with pytest.raises(ProcessingError, match="Hooked"):
            reload(model, B)
    check_unharmed(model, Hooked, before, ids)


def reload_in_parts(model: nn.Module, checkpoint: Weights) -> None:
    """Between two weights the model serves what it served."""
    with ReloadSession(model) as session:
        for item in checkpoint.items():
            session.load([item])
        session.finish()


FAILING = [(stage, how) for stage in ("materialise", "take_result") for how in (reload, reload_in_parts)]


@pytest.mark.parametrize(("stage", "how"), [*FAILING, ("hide", reload_in_parts), ("unhide", reload_in_parts)])
def test_a_stage_that_fails_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, stage: str, how: Callable
) -> None:
    from reload_plugin.record.staged_group import StagedGroup

    model = start()
    before, ids = values(model), identities(model)
    with monkeypatch.context() as patch:
        failing_once(patch, StagedGroup, stage, MemoryError("no memory"))
        with pytest.raises((ReloadError, MemoryError)):
            how(model, B)
    check_unharmed(model, Model, before, ids)


def test_after_the_last_weights_the_model_waits_in_load_format_for_the_end() -> None:
    model = start()
    before, ids = values(model), identities(model)
    with ReloadSession(model) as session:
        session.load([("first.weight", B["first.weight"])])
        assert values(model) == before
        session.load_last([("lm_head.weight", B["lm_head.weight"])])
        assert values(model) != before
        session.finish()
    assert values(model) == values(cold(Model, B))
    assert identities(model) == ids


def test_the_old_weights_are_served_again_when_the_last_ones_do_not_come() -> None:
    model = start()
    before, ids = values(model), identities(model)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first.weight", B["first.weight"]
        raise OSError("gone")

    with ReloadSession(model) as session:
        with pytest.raises(SourceError, match="gone"):
            session.load_last(stream())
        assert values(model) == before
    with ReloadSession(model) as session:
        session.load_last([("first.weight", B["first.weight"])])
        with pytest.raises(MissingWeightsError):
            session.finish()
    check_unharmed(model, Model, before, ids)


def test_a_commit_that_cannot_begin_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = start()
    before, ids = values(model), identities(model)

    def failing(self: Commit) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Commit, "apply", failing)
        with pytest.raises(ReloadError, match="MemoryError: no memory"):
            reload(model, B)
    check_unharmed(model, Model, before, ids)


def test_a_commit_that_stops_half_way_is_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing keeps the old values then, so the model refuses until a good reload heals it."""
    model = start()
    with monkeypatch.context() as patch:
        failing_once(patch, Commit, "apply", MemoryError("no memory"))
        with pytest.raises(EngineBrokenError, match="refuses to serve"):
            reload(model, B)
    with pytest.raises(EngineBrokenError, match="does not serve"):
        state_of(model).before_forward_pass()
    reload(model, B)
    state_of(model).before_forward_pass()
    assert values(model) == values(cold(Model, B))


def test_ctrl_c_during_the_commit_waits_until_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = start()
    apply, calls = Commit.apply, []

    def interrupted(self: Commit) -> None:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        apply(self)

    # A process that was started in the background ignores the signal; here it is to be Python's own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Commit, "apply", interrupted)
            with pytest.raises(KeyboardInterrupt):
                reload(model, B)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) > 1
    assert values(model) == values(cold(Model, B))


class Filling(Model):
    """Writes as many rows as it is sent, into whatever memory is there."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameters[name].data[: len(tensor)].copy_(tensor)
        return set(parameters)


def test_half_of_a_parameter_is_missing_at_every_reload() -> None:
    """Also when the layer has all its weights by name, because an earlier reload told which they are."""
    model = cold(Filling, A, trace=True)
    short = {name: tensor[:2] for name, tensor in B.items()}
    for _ in range(2):
        with pytest.raises(MissingWeightsError, match="was not sent"):
            reload(model, short)
        assert values(model) == values(cold(Filling, A, trace=True))
        reload(model, A)


def test_a_weight_missing_from_a_model_recorded_by_hand_is_named() -> None:
    model = start()
    with pytest.raises(MissingWeightsError, match=r"lm_head\.weight"):
        reload(model, {"first.weight": B["first.weight"]})


def test_the_same_session_goes_on_after_a_source_that_failed() -> None:
    model = start()
    with ReloadSession(model) as session:
        with pytest.raises(SourceError):
            session.load(stopping(BadSourceError("network")))
        session.load([("lm_head.weight", B["lm_head.weight"])])
        session.finish()
    assert values(model) == values(cold(Model, B))


# --- memory ---


@pytest.mark.parametrize("trace", [False, True], ids=["recorded by hand", "watched"])
def test_a_record_keeps_no_tensor_alive_that_processing_dropped(trace: bool) -> None:
    made: list[weakref.ref] = []

    def make() -> nn.Module:
        model = Model(Packing)
        made.extend(weakref.ref(p) for p in model.parameters())
        return model

    model = cold(make, A, trace)
    gc.collect()
    assert record_of(model).complete
    assert [ref() for ref in made] == [None, None]


@pytest.mark.parametrize("make", [Model, Tied, Hooked, ViewedByAnother, lambda: Model(Online)])
def test_a_model_is_freed_with_its_record_after_reloads(make: Make) -> None:
    model = cold(make, A)
    reload(model, B)
    with pytest.raises(ReloadError):
        reload_weights(model, iter([("first.weight", torch.zeros(9, 9))]))
    reload(model, A)
    refs = [weakref.ref(model), weakref.ref(record_of(model)), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_a_session_that_is_over_holds_no_staging() -> None:
    model = start()
    for end in ("finish", "abort"):
        session = ReloadSession(model)
        with session:
            session.load(B.items())
            storages = [weakref.ref(s) for s, _ in session.parts.completeness._storages.values()]
            getattr(session, end)()
        session.parts.completeness._storages.clear()
        del session
        gc.collect()
        assert [ref() for ref in storages] == [None] * len(storages)


def test_a_session_that_is_over_is_freed_at_once() -> None:
    """What waits for the garbage collector is memory that a few reloads in a row take several times."""
    model = start()
    gc.collect()
    gc.disable()
    try:
        with ReloadSession(model) as session:
            session.load(B.items())
            session.finish()
        gone = weakref.ref(session)
        del session
        assert gone() is None
    finally:
        gc.enable()


def test_the_garbage_collector_is_left_as_it_was() -> None:
    model, before = start(), (gc.isenabled(), gc.get_threshold())
    during = []

    def watching() -> Iterator[tuple[str, torch.Tensor]]:
        during.append(gc.get_threshold())
        yield from B.items()

    reload_weights(model, watching())
    assert during[0][:2] == before[1][:2]
    assert during[0] != before[1], "full searches go on"
    with pytest.raises(ReloadError):
        reload_weights(model, iter([("first.weight", torch.zeros(9, 9))]))
    assert (gc.isenabled(), gc.get_threshold()) == before


def test_a_tensor_that_is_made_unseen_has_not_the_values_of_one_that_is_gone() -> None:
    """No mode sees ``torch.tensor`` make something, and it is made where the last scalar was."""
    trace = ConstructionTrace()
    with trace:
        for _ in range(100):
            torch.zeros(())
            scalar = torch.tensor(1.0)
            assert storage_id(scalar) not in trace.initial


# --- results written to where they are served ---


def test_streaming_packs_into_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy is left to do, and none of the other policies may do that."""
    copied: list[int] = []
    copy = CpuOps.copy
    monkeypatch.setattr(CpuOps, "copy", lambda ops, to, new: copied.append(new.nbytes) or copy(ops, to, new))
    for policy, expected in (("staged", True), ("streaming", False)):
        model = start(Model, Shrinking)
        copied.clear()
        with ReloadSession(model, policy=policy) as session:
            session.load(B.items())
            session.finish()
        assert bool(copied) is expected
        assert values(model) == values(cold(lambda: Model(Shrinking), B))


@pytest.mark.parametrize(("policy", "touched"), [("staged", False), ("streaming", True)])
def test_a_failure_after_a_result_was_written_in_place_is_reported(policy: str, touched: bool) -> None:
    """The caller has to know, or the half-written layer would count as the old one."""
    model = start(Model, Shrinking)
    old = values(model)
    model.lm_head.quant_method.fails = True
    with ReloadSession(model, policy=policy) as session:
        with pytest.raises(ProcessingError, match="after packing"):
            session.load([("lm_head.weight", B["lm_head.weight"]), ("first.weight", B["first.weight"])])
        assert ("lm_head" in session.touched_groups) is touched
    del model.lm_head.quant_method.fails
    assert (values(model) != old) is touched


@pytest.mark.parametrize(("policy", "replaced"), [("staged", False), ("streaming", True)])
def test_torch_is_touched_only_where_served_memory_may_be_given(policy: str, replaced: bool) -> None:
    original, seen = torch.empty_like, []

    class Looking(Method):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            seen.append(torch.empty_like is not original)
            layer.scale = float(layer.weight.sum())

    model = cold(lambda: Model(Looking), A)
    seen.clear()
    with ReloadSession(model, policy=policy) as session:
        session.load(B.items())
        session.finish()
    assert seen == [replaced] * 2
    assert torch.empty_like is original


def test_replaceable_served_memory_is_computed_only_when_an_output_is_requested() -> None:
    asked: list[int] = []

    def served() -> list[torch.Tensor]:
        asked.append(1)
        return [torch.zeros(2)]

    with results.reusing_served_outputs() as places, places.offered(served):
        torch.zeros(2).add_(1)
        assert asked == []
        torch.empty_like(torch.zeros(2))
        torch.empty_like(torch.zeros(2))
    assert asked == [1]


def test_served_memory_is_offered_layer_by_layer() -> None:
    first, second = torch.zeros(2, 3), torch.zeros(2, 3)
    with results.reusing_served_outputs() as places:
        for served in (first, second):
            with places.offered(lambda served=served: [served]) as given:
                assert torch.empty_like(served).data_ptr() == served.data_ptr()
                assert given == {storage_id(served)}
            assert torch.empty_like(served).data_ptr() not in (first.data_ptr(), second.data_ptr())
        with places.offered(lambda: [first]) as given:
            assert given == set()


@pytest.mark.parametrize("policy", ["host", "streaming"])
def test_code_of_the_caller_between_weights_gets_no_served_memory(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """A trainer in the same process may run a model of its own between two weights. Its native handles are
    not noted, and it is given no served memory.
    """
    hashed: list[int] = []

    class Library:
        @staticmethod
        def make(_: torch.Tensor) -> int:
            return 7

    class Making(Method):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            layer.register_buffer("handle", torch.tensor(Library.make(layer.weight.data)))

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for item in B.items():
            mine = torch.ones(3)
            kept = weakref.ref(mine)
            Library.make(mine)
            del mine
            assert kept() is None
            served = {parameter.data_ptr() for parameter in model.parameters()}
            assert not served & {torch.empty_like(parameter).data_ptr() for parameter in model.parameters()}
            yield item

    monkeypatch.setattr(vllm_api, "native_constructors", lambda: [(Library, "make", None)])
    monkeypatch.setattr(native, "_digest_of", lambda given: hashed.append(given[0].numel()) or b"")
    model = cold(lambda: Model(Making), A)
    hashed.clear()
    reload_weights(model, stream(), policy=policy)
    reload_weights(model, stream(), policy=policy)  # by the copy plan: layers are processed between weights
    assert hashed == [12] * 4
    assert Library.make(torch.ones(3)) == 7
    assert len(hashed) == 4


def test_only_the_plain_call_is_given_served_memory() -> None:
    served = torch.arange(6.0).reshape(2, 3)
    like = torch.zeros(2, 3)
    with results.reusing_served_outputs() as places, places.offered(lambda: [served]) as given:
        others = [
            torch.empty_like(like, dtype=torch.float64),
            torch.empty_like(like, device="meta"),
            torch.empty_like(like.t()),
            torch.empty_like(like.to(torch.int32)),
            torch.empty_like(torch.zeros(3, 2)),
        ]
        thread = threading.Thread(target=lambda: others.append(torch.empty_like(like)))
        thread.start()
        thread.join()
        assert not given
        first, second = torch.empty_like(like), torch.empty_like(like)
    assert first.data_ptr() == served.data_ptr()
    assert served.data_ptr() not in {t.data_ptr() for t in (*others, second)}
    assert torch.empty_like(served).data_ptr() != served.data_ptr(), "still replaced"


# --- weights written straight to where they are served ---


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parameters whose served memory is given as staging."""
    found: list[str] = []
    materialise = staged_storage.StagedStorage.materialise

    def noting(storage: staged_storage.StagedStorage, *args: Any, **kwargs: Any) -> None:
        materialise(storage, *args, **kwargs)
        found.extend([storage.primary.name] if storage.is_served_memory else [])

    monkeypatch.setattr(staged_storage.StagedStorage, "materialise", noting)
    return found


WRITTEN_STRAIGHT = {Method: True, Smudging: True, Packing: False, Deleting: False, Online: False}


@pytest.mark.parametrize(
    ("kind", "method"),
    [(Model, method) for method in METHODS]
    + [(kind, method) for kind in (Tied, Hooked) for method in (Method, Packing, Shrinking, Smudging)],
)
def test_only_streaming_loads_into_served_memory(
    kind: type[Model], method: type[QuantizeMethodBase], straight: list[str]
) -> None:
    """Where loaders are to write to it; and everything comes out as from a cold start."""
    model = cold(lambda: kind(method), A)
    for policy, new in (("host", B), ("streaming", A), ("streaming", B), ("host", A)):
        straight.clear()
        reload_weights(model, iter(new.items()), policy=policy)
        expected = WRITTEN_STRAIGHT.get(method)
        if policy == "host":
            assert straight == []
        elif expected is not None and kind is Model:
            assert bool(straight) is expected
        assert values(model) == values(cold(lambda: kind(method), new))


@pytest.mark.parametrize("policy", ["host", "streaming"])
def test_a_failure_after_a_weight_was_loaded_into_served_memory_is_reported(policy: str) -> None:
    model = start(Model, Method)
    reload(model, A)
    old = values(model)

    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first.weight", B["first.weight"]
        raise OSError("gone")

    with pytest.raises(EngineBrokenError if policy == "streaming" else SourceError, match="gone"):
        reload_weights(model, breaking(), policy=policy)
    assert (values(model) == old) is (policy == "host")
    reload(model, B)
    assert values(model) == values(cold(lambda: Model(Method), B))


# --- the report ---


def test_the_report_accounts_for_what_came() -> None:
    model = start()
    for version in (1, 2, 3):
        report = reload(model, B)
        assert (report.tensors, report.nbytes) == (2, sum(t.nbytes for t in B.values()))
        assert report.version == version
        assert report.moved == ()
        assert report.policy == "staged"
        assert report.staging_bytes >= 4 * 3 * 4


def test_waiting_for_the_weights_is_told_from_loading_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = 0.05
    apply = Commit.apply
    monkeypatch.setattr(Commit, "apply", lambda commit: (apply(commit), time.sleep(2 * asleep)))

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        for item in B.items():
            time.sleep(asleep)
            yield item

    model = start()
    for replayed in (0, len(B)):
        report = reload_weights(model, slowly())
        assert report.replayed == replayed
        stages = {stage: report.seconds[stage] for stage in ("read", "load", "process", "commit")}
        assert stages["read"] >= len(B) * asleep
        assert sum(stages.values()) <= report.seconds["total"], "no second is counted twice"
        assert stages["load"] > 0, "seconds of the commit are not taken from those of loading"


def test_what_cannot_be_hashed_leaves_a_reload_without_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = start()
    assert reload(model, B).digest is not None

    def unhashable(total: object, tensor: torch.Tensor) -> None:
        raise NotImplementedError(f"no bytes in a {type(tensor).__name__}")

    monkeypatch.setattr(digest.Hash, "add_tensor", unhashable)
    report = reload(model, B)
    assert (report.digest, report.version) == (None, 2)
