"""Loaders that write a weight when others have come since, or more than came: that is not replayed."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vllm.model_executor.model_loader import utils

from reload_plugin import ReloadSession, reload_weights
from reload_plugin.checkpoint import TensorInfo
from reload_plugin.plan import provenance as provenance_module
from reload_plugin.plan.checkpoint_plan import make_plan
from reload_plugin.plan.known_checkpoint import KnownCheckpoint
from reload_plugin.plan.provenance import Provenance
from reload_plugin.record import layer_groups as record_module
from reload_plugin.record.construction_trace import ConstructionTrace
from reload_plugin.record.recorder import record_constructed
from reload_plugin.record.staged_storage import POISON
from tests.transaction.test_session import CONFIG, CPU, registered  # noqa: F401 - the fixture is used by itself

Weights = dict[str, torch.Tensor]
SIZE = 4
"""Elements of a weight, and of a slot."""
END = 99
"""A moment after the last weight."""


def _with_other_data(weight: torch.Tensor) -> torch.Tensor:
    weight.data = (weight.data * 2).flip(0)
    return weight


def _with_part_of_its_data(weight: torch.Tensor) -> torch.Tensor:
    whole = weight.data
    weight.data = whole[1:]
    part = weight.repeat(2)[:SIZE]
    weight.data = whole
    return part


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda weight: weight,
    "negated": lambda weight: -weight,
    "in double": lambda weight: weight.double(),
    "in place": lambda weight: weight.add_(1),
    "in part": lambda weight: weight[1:].neg_()._base,
    "other data": _with_other_data,
    "a part": _with_part_of_its_data,
    "a view": lambda weight: weight.view(2, -1).view(-1),
}


def _in_a_buffer(slot: torch.Tensor, one: torch.Tensor, two: torch.Tensor) -> None:
    destinations = one.new_empty(SIZE, dtype=torch.float32)
    destinations[:1].copy_(one[:1])
    destinations[1:].copy_(two[1:])
    slot.copy_(destinations)


def _by_a_list(slot: torch.Tensor, one: torch.Tensor, two: torch.Tensor) -> None:
    torch._foreach_copy_([slot[:1], slot[1:]], [one[:1].float(), two[1:]])


TOGETHER: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]] = {
    "a sum": lambda slot, one, two: slot.copy_(one + two),
    "out": lambda slot, one, two: torch.add(one.float(), two, out=slot),
    "a buffer": _in_a_buffer,
    "a list": _by_a_list,
}


@dataclass(frozen=True)
class Step:
    """One slot: which weight it takes (None: a constant), when (after so many weights), and how."""

    weight: int | None
    when: int
    change: str
    early: bool
    """Whether the change is made when the weight comes."""
    other: int | None = None
    """Another weight that it is put together with, if that has come; a constant is written only then."""
    how: str = "a sum"


class Layer(nn.Module):
    def __init__(self, slots: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(slots, SIZE), requires_grad=False)


class Model(nn.Module):
    """Its loader follows a list of steps, one for each slot of its layers."""

    def __init__(self, layers: list[list[Step]]) -> None:
        super().__init__()
        self.steps = layers
        self.layers = nn.ModuleList(Layer(len(steps)) for steps in layers)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        held: dict[tuple[int, str], torch.Tensor] = {}
        came: set[int | None] = {None}
        for name, tensor in weights:
            number = int(name.removeprefix("w"))
            came.add(number)
            wanted = [step for step in self._all if number in (step.weight, step.other)]
            held |= {(number, s.change): CHANGES[s.change](tensor) for s in wanted if s.early}
            if wanted:
                held[number, "raw"] = tensor
            del tensor
            self._write(number, held, came)
            self._drop(number, held)
        self._write(END, held, came)

    @property
    def _all(self) -> list[Step]:
        return [step for steps in self.steps for step in steps]

    def _drop(self, now: int, held: dict[tuple[int, str], torch.Tensor]) -> None:
        """Hold nothing that no step after this one wants."""
        for weight, change in list(held):
            wanting = [step for step in self._all if weight in (step.weight, step.other)]
            if all(step.when == now for step in wanting):
                del held[weight, change]

    def _write(self, now: int, held: dict[tuple[int, str], torch.Tensor], came: set[int | None]) -> None:
        for layer, steps in zip(self.layers, self.steps, strict=True):
            for slot, step in zip(layer.weight.data, steps, strict=True):
                if step.when != now:
                    continue
                if step.weight is None:
                    if step.other in came:
                        slot.copy_(torch.full((SIZE,), 5.0))
                elif (step.weight, "raw") in held:
                    early = held.get((step.weight, step.change)) if step.early else None
                    value = CHANGES[step.change](held[step.weight, "raw"]) if early is None else early
                    more = None if step.other is None else held.get((step.other, "raw"))
                    if more is None:
                        slot.copy_(value)
                    else:
                        TOGETHER[step.how](slot, value, more)


def checkpoint(seed: int, count: int, order: Sequence[int] | None = None) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights = {f"w{number}": torch.randn(SIZE, generator=generator) for number in range(count)}
    return {name: weights[name] for name in map("w{}".format, range(count) if order is None else order)}


def cold(layers: list[list[Step]], weights: Weights, kind: type[Model] = Model) -> Model:
    with (trace := ConstructionTrace()):
        model = kind(layers)
    record_constructed(model, trace, None)
    model.load_weights((name, tensor.clone()) for name, tensor in weights.items())
    utils.process_weights_after_loading(model, CONFIG, CPU)
    return model


def values(model: nn.Module) -> list[list[float]]:
    return [parameter.flatten().tolist() for parameter in model.parameters()]


def planned(model: Model, weights: Weights) -> None:
    """As a folder is loaded: planned first, and by the copy plan where there is one."""
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in weights.items()]
    plan = make_plan(model, infos, "a folder")
    assert not plan.mismatches
    known = KnownCheckpoint(plan.names_of_group, True, plan.copy_plan)
    with ReloadSession(model, policy="streaming", expected=known) as session:
        session.load_last((name, tensor.clone()) for name, tensor in weights.items())
        session.finish()


def streamed(model: Model, weights: Weights) -> None:
    reload_weights(model, ((name, tensor.clone()) for name, tensor in weights.items()))


def in_one_buffer(model: Model, weights: Weights) -> None:
    """Its caller overwrites every weight as soon as the loader asks for the next."""
    destinations = torch.empty(SIZE)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights.items():
            destinations.copy_(tensor)
            yield name, destinations
            destinations.fill_(float("nan"))

    reload_weights(model, stream())


Case = tuple[list[list[Step]], list[int]]


@st.composite
def loaders(draw: st.DrawFn) -> Case:
    """The slots of some layers, and the order of some weights, each of which goes to one slot at least."""
    count = draw(st.integers(1, 6))
    order = draw(st.just(list(range(count))) | st.permutations(range(count)))
    layers: list[list[Step]] = [[] for _ in range(draw(st.integers(1, 3)))]
    more = draw(st.lists(st.none() | st.integers(0, count - 1), max_size=4))
    for number, weight in enumerate(draw(st.permutations([*range(count), *more]))):
        position = 0 if weight is None else order.index(weight)
        later = st.sampled_from([*order[position:], END])
        when = draw(st.just(order[position]) | later)
        come = st.sampled_from(order[: order.index(when) + 1] if when != END else order)
        other = draw(st.none() | come)
        step = Step(
            weight,
            when,
            draw(st.sampled_from(sorted(CHANGES))),
            draw(st.booleans()),
            other,
            draw(st.sampled_from(sorted(TOGETHER))),
        )
        layers[number % len(layers)].append(step)
    return [steps for steps in layers if steps], order


@settings(deadline=None, database=None, max_examples=300)
@given(loaders())
@mock.patch.dict(os.environ, {POISON: "1"})
def test_whatever_a_loader_does_a_reload_is_a_cold_start(case: Case) -> None:
    layers, order = case
    checkpoints = [checkpoint(seed, len(order), order) for seed in (1, 2, 3)]
    expected = [values(cold(layers, weights)) for weights in checkpoints]
    for reload in (planned, streamed, in_one_buffer):
        model = cold(layers, checkpoints[0])
        for number in (1, 2, 2, 0):
            reload(model, checkpoints[number])
            assert values(model) == expected[number]


NOW, LATER, AFTER = (
    Step(0, 0, "as it is", False),
    Step(0, 2, "as it is", False),
    Step(0, END, "as it is", False),
)
OTHER, THIRD = Step(1, 1, "as it is", False), Step(2, 2, "as it is", False)
CAST = Step(0, 2, "in double", True)
CONSTANT = Step(None, END, "as it is", False)
WITH_ONE, OF_ANOTHER = Step(None, 1, "as it is", False), Step(None, 1, "as it is", False, other=0)


@pytest.mark.parametrize(
    ("steps", "copy_plan"),
    [
        ([NOW, OTHER, THIRD], True),
        ([LATER, OTHER, THIRD], False),
        ([CAST, OTHER, THIRD], False),
        ([AFTER, OTHER, THIRD], False),
        ([NOW, OTHER, THIRD, CONSTANT], False),
        ([NOW, OTHER, THIRD, LATER], False),
        ([NOW, OTHER, THIRD, WITH_ONE], True),
        ([NOW, OTHER, THIRD, OF_ANOTHER], False),
        *(([NOW, dataclasses.replace(OTHER, other=0, how=how), THIRD], False) for how in TOGETHER),
    ],
)
def test_only_what_is_written_when_it_comes_is_replayed(
    monkeypatch: pytest.MonkeyPatch, steps: list[Step], copy_plan: bool
) -> None:
    """The first weight is kept back while the second is written."""
    model = cold([[step] for step in steps], checkpoint(1, 3))
    for many in (provenance_module._MANY, 0):
        monkeypatch.setattr(provenance_module, "_MANY", many)
        infos = [TensorInfo(f"w{number}", (SIZE,), torch.float32) for number in range(3)]
        plan = make_plan(model, infos, "a folder")
        assert (plan.copy_plan is not None) is copy_plan
        assert bool(plan.names_of_group) is copy_plan


class Copying(Model):
    """Its loader takes what another weight left in a parameter."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        first, second = (layer.weight.data[0] for layer in self.layers)
        for name, tensor in weights:
            (first if name == "w0" else second).copy_(tensor)
            if name == "w1":
                second.add_(2 * first)


class Exponential(Model):
    """Its loader takes what it has just left in the parameter itself, as that of Mamba's A does."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            parameter = self.layers[int(name.removeprefix("w"))].weight
            parameter.data.copy_(tensor)
            parameter.data.copy_(-torch.exp(parameter.float()))


class Growing(Model):
    """Its loader does that with what all weights of the parameter have left there so far."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameter = self.layers[0].weight
        parameter.data.zero_()
        for name, tensor in weights:
            parameter.data[int(name.removeprefix("w"))].copy_(tensor)
            parameter.data.copy_(parameter * 2)


@pytest.mark.parametrize(
    ("kind", "layers", "copy_plan"),
    [
        (Copying, [[NOW], [OTHER]], False),
        (Exponential, [[NOW], [OTHER]], True),
        (Growing, [[NOW, OTHER]], False),
    ],
)
def test_nor_is_what_comes_of_another_weights_parameter(
    kind: type[Model], layers: list[list[Step]], copy_plan: bool
) -> None:
    model = cold(layers, checkpoint(1, 2), kind)
    for reload in (planned, streamed, in_one_buffer):
        for seed in (2, 3):
            reload(model, checkpoint(seed, 2))
            assert values(model) == values(cold(layers, checkpoint(seed, 2), kind))
    infos = [TensorInfo(f"w{number}", (SIZE,), torch.float32) for number in range(2)]
    assert (make_plan(model, infos, "a folder").copy_plan is not None) is copy_plan


@pytest.mark.parametrize(("late", "order"), [(False, ["w0", "w2", "w1"]), (True, ["w0", "w1", "w2"])])
def test_a_loader_that_keeps_weights_back_gets_them_in_their_own_order(
    monkeypatch: pytest.MonkeyPatch, late: bool, order: list[str]
) -> None:
    """Others get them layer by layer."""
    monkeypatch.setattr(record_module, "SMALL_GROUP", -1)
    first = [NOW, dataclasses.replace(THIRD, when=END if late else 2)]
    model = cold([first, [OTHER]], checkpoint(1, 3))
    infos = [TensorInfo(f"w{number}", (SIZE,), torch.float32) for number in range(3)]
    assert list(make_plan(model, infos, "a folder").order) == order


@pytest.mark.parametrize("dry", [False, True])
def test_what_is_gone_is_not_remembered(monkeypatch: pytest.MonkeyPatch, dry: bool) -> None:
    """Of weights that were loaded, and of those that the loader had no use for."""
    most: list[int] = []
    monkeypatch.setattr(provenance_module, "_MANY", 10)
    monkeypatch.setattr("reload_plugin.plan.dry_run._AT_A_TIME", 10)
    begin = Provenance.begin

    def noting(provenance: Provenance, *args: object) -> None:
        begin(provenance, *args)
        most.append(len(provenance._held))
        assert provenance._held.keys() == provenance._sources.keys()

    monkeypatch.setattr(Provenance, "begin", noting)
    count = 600
    used = [Step(number, number, "negated", False) for number in range(count // 2)]
    model = cold([used], checkpoint(1, count))
    infos = [TensorInfo(f"w{number}", (SIZE,), torch.float32) for number in range(count)]
    if dry:
        make_plan(model, infos, "a folder")
    else:
        with ReloadSession(model) as session:
            session.load((name, tensor.clone()) for name, tensor in checkpoint(2, count).items())
    assert len(most) == count + (count // 2 if dry else 0)  # what is computed is tried alone as well
    assert max(most) < 100
