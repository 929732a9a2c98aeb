"""What a layer and its helpers hold: reading it, changing it, putting it back."""

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reload_plugin.record.module_state import holders_of, tensors_in
from reload_plugin.record.snapshot import ABSENT, put_back, read, same, write

TRY = settings(deadline=None, database=None, max_examples=60)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("dropped", torch.ones(2), persistent=False)
        self.child = nn.Linear(2, 2)
        self.scale = 0.5
        self.plain = torch.arange(3)


@dataclasses.dataclass(frozen=True)
class Frozen:
    scale: float
    weight: torch.Tensor


class Slotted:
    __slots__ = ("scale", "weight")

    def __init__(self) -> None:
        self.scale, self.weight = 0.5, torch.zeros(2)


class SlottedChild(Slotted):
    __slots__ = ("more",)


class Half(Slotted):
    """Slots from its base and a dictionary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = 7


class Plain:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


def order_of(layer: nn.Module) -> list[list[str]]:
    return [list(layer.__dict__[table]) for table in ("_parameters", "_buffers", "_modules")]


def unchanged(holder: object, contents: dict) -> bool:
    now = read(holder)
    return now.keys() == contents.keys() and all(same(now[key], contents[key]) for key in contents)


# --- modules ---


def shrink(layer: nn.Module) -> None:
    del layer.weight, layer.kept, layer.scale


def replace(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.ones(5), requires_grad=False)
    layer.kept = torch.zeros(9)
    layer.scale = None


def turn_round(layer: nn.Module) -> None:
    weight = layer.weight
    del layer.weight
    layer.register_parameter("weight", weight)


def change_tables(layer: nn.Module) -> None:
    del layer.weight, layer.child
    layer.register_buffer("weight", torch.ones(2), persistent=False)
    layer.child = "a string now"


def grow(layer: nn.Module) -> None:
    layer.packed = nn.Parameter(torch.ones(1), requires_grad=False)
    layer.register_buffer("table", torch.ones(1))
    layer.handle = 12


def persist_differently(layer: nn.Module) -> None:
    layer._non_persistent_buffers_set.clear()
    layer._non_persistent_buffers_set.add("kept")


CHANGES = [shrink, replace, turn_round, change_tables, grow, persist_differently]


@TRY
@given(st.lists(st.sampled_from(CHANGES), max_size=1) | st.permutations(CHANGES[3:]))
def test_a_module_holds_the_same_again_in_the_same_order(changes: list[Callable]) -> None:
    layer = Layer()
    contents, order = read(layer), order_of(layer)
    persistent = list(layer.state_dict())
    for change in changes:
        change(layer)
    put_back(layer, contents)
    assert unchanged(layer, contents)
    assert order_of(layer) == order
    assert layer._non_persistent_buffers_set == {"dropped"}
    assert list(layer.state_dict()) == persistent


def test_putting_back_keeps_the_modules_own_containers() -> None:
    layer = Layer()
    contents, tables = read(layer), [layer._parameters, layer._buffers, layer._non_persistent_buffers_set]
    change_tables(layer)
    put_back(layer, contents)
    after = [layer._parameters, layer._buffers, layer._non_persistent_buffers_set]
    assert all(a is b for a, b in zip(tables, after, strict=True))


def test_what_was_read_does_not_change_with_the_module() -> None:
    layer = Layer()
    contents = read(layer)
    layer._non_persistent_buffers_set.add("kept")
    assert contents["attribute", "_non_persistent_buffers_set"] == {"dropped"}


def test_hooks_and_training_internals_are_not_state() -> None:
    layer = Layer()
    contents = read(layer)
    layer.register_forward_hook(print)
    assert read(layer).keys() == contents.keys()


def test_our_own_attributes_are_not_state() -> None:
    layer = Layer()
    layer.__dict__["_reload_plugin_record"] = object()
    layer.__dict__["load_weights"] = print
    assert not {"_reload_plugin_record", "load_weights"} & {name for _, name in read(layer)}


# --- everything else ---

KEYS = st.sampled_from("abcd")
VALUES = st.integers(0, 5)


@TRY
@given(st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS, VALUES))
def test_a_dict_holds_the_same_again(before: dict, after: dict) -> None:
    held = dict(before)
    contents = read(held)
    held.clear()
    held.update(after)
    put_back(held, contents)
    assert held == before


@TRY
@given(st.lists(VALUES, max_size=5), st.lists(VALUES, max_size=5))
def test_a_list_holds_the_same_again(before: list, after: list) -> None:
    held = list(before)
    contents = read(held)
    held[:] = after
    put_back(held, contents)
    assert held == before


@pytest.mark.parametrize(
    "holder",
    [Frozen(0.5, torch.zeros(2)), Slotted(), SlottedChild(), Half(), Plain(scale=0.5, weight=torch.zeros(2))],
    ids=lambda h: type(h).__name__,
)
def test_an_object_holds_the_same_again(holder: object) -> None:
    contents, weight = read(holder), holder.weight
    assert ("attribute", "weight") in contents
    write(holder, ("attribute", "weight"), torch.ones(4))
    write(holder, ("attribute", "scale"), ABSENT)
    assert not hasattr(holder, "scale")
    put_back(holder, contents)
    assert holder.scale == 0.5
    assert holder.weight is weight
    assert unchanged(holder, contents)


def test_slots_nobody_set_are_absent_and_can_be_set_and_taken_away() -> None:
    holder = SlottedChild()
    contents = read(holder)
    assert ("attribute", "more") not in contents
    write(holder, ("attribute", "more"), 3)
    assert holder.more == 3
    put_back(holder, contents)
    assert not hasattr(holder, "more")


def test_write_bypasses_setters() -> None:
    class Refuses:
        def __init__(self) -> None:
            self.__dict__["scale"] = 1

        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    holder = Refuses()
    write(holder, ("attribute", "scale"), 2)
    assert holder.scale == 2


def test_deleting_what_is_not_there_is_harmless() -> None:
    for holder, key in [
        ({}, ("item", "a")),
        ([], ("item", 0)),
        (Plain(), ("attribute", "a")),
        (Layer(), ("_buffers", "a")),
    ]:
        write(holder, key, ABSENT)


# --- one look after another ---


def renew(layer: nn.Module) -> None:
    """Every table changes in one entry, without a new key."""
    layer.weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    layer.kept = torch.zeros(2)
    layer.child = nn.Linear(2, 2)
    layer.scale = 0.25


def rename(layer: nn.Module) -> None:
    """The same values in the same order under other names."""
    layer.other = layer.__dict__.pop("plain")
    layer._modules["younger"] = layer._modules.pop("child")


HOLDERS: dict[str, tuple[Callable[[], object], list[Callable]]] = {
    "module": (Layer, [*CHANGES, renew, rename]),
    "object": (
        lambda: Plain(scale=0.5, weight=torch.zeros(2)),
        [
            lambda o: delattr(o, "scale"),
            lambda o: setattr(o, "new", 1),
            lambda o: setattr(o, "weight", None),
            lambda o: setattr(o, "other", o.__dict__.pop("weight")),
        ],
    ),
    "slots": (Half, [lambda o: delattr(o, "scale"), lambda o: setattr(o, "extra", 8)]),
    "dict": (
        lambda: {"a": 1, "b": [2]},
        [
            lambda d: d.pop("a"),
            lambda d: d.update(c=3),
            lambda d: d.update(b=[2]),
            lambda d: d.update(a=d.pop("a")),
            lambda d: d.update(c=d.pop("b")),
        ],
    ),
    "list": (lambda: [[1], [2]], [list.pop, list.clear, lambda o: o.append(3), list.reverse]),
}


@pytest.mark.parametrize(("make", "changes"), HOLDERS.values(), ids=HOLDERS)
def test_a_second_snapshot_has_every_change_and_the_first_is_unchanged(
    make: Callable[[], object], changes: list[Callable]
) -> None:
    for change in (lambda _: None, *changes):
        holder = make()
        first = read(holder)
        before = dict(first)
        change(holder)
        second = read(holder, first)
        assert list(second.items()) == list(read(holder).items())
        assert all(second[key] is value for key, value in read(holder).items())
        assert dict(read(make())).keys() == before.keys() == dict(first).keys()
        assert all(first[key] is value for key, value in before.items())
        same_objects = list(map(id, before.values())) == list(map(id, second.values()))
        assert second.is_same_as(first) == (same_objects and list(before) == list(second))
        assert (second is first) == second.is_same_as(first), "the same is not held twice"


@pytest.mark.parametrize(("make", "changes"), HOLDERS.values(), ids=HOLDERS)
def test_what_differs_is_found_with_what_was_asked_for_and_what_is_gone(
    make: Callable[[], object], changes: list[Callable]
) -> None:
    for change in (lambda _: None, *changes):
        holder = make()
        before = read(holder)
        asked = frozenset(id(value) for value in before.values() if isinstance(value, torch.Tensor))
        change(holder)
        after = read(holder, before)
        changed = {key for key, value in after.items() if before.get(key, ABSENT) is not value}
        for besides in (frozenset(), asked):
            found = list(before.changes_to(after, besides))
            wanted = changed | {key for key, value in after.items() if id(value) in besides}
            assert {key for key, _, _ in found} == wanted
            assert len(found) == len(wanted)
            assert all(old is before.get(key, ABSENT) and new is after[key] for key, old, new in found)
        gone = list(before.keys_missing_in(after))
        assert set(gone) == before.keys() - after.keys()
        assert len(gone) == len(set(gone))


def test_a_value_is_found_under_its_own_kind_of_key_only() -> None:
    layer = Layer()
    layer.__dict__["weight"] = 3  # beside the parameter of that name
    held = read(layer)
    assert held.get(("_parameters", "weight")) is layer._parameters["weight"]
    assert held.get(("attribute", "weight")) == 3
    assert held.get(("_buffers", "weight"), ABSENT) is ABSENT
    assert held.get(("attribute", "_non_persistent_buffers_set")) == {"dropped"}
    assert {key: held.get(key) for key in held} == dict(held)


@pytest.mark.parametrize(("make", "changes"), HOLDERS.values(), ids=HOLDERS)
def test_every_change_is_undone_and_can_be_made_again(
    make: Callable[[], object], changes: list[Callable]
) -> None:
    for change in changes:
        holder = make()
        before = read(holder)
        change(holder)
        after = read(holder, before)
        put_back(holder, before, after)
        assert read(holder).keys() == before.keys()
        for wanted in (before, after):
            put_back(holder, wanted)
            assert read(holder).keys() == wanted.keys()
            assert all(read(holder)[key] is value for key, value in wanted.items())


def test_what_is_torchs_own_is_no_change_and_stays() -> None:
    layer = Layer()
    before = read(layer)
    layer._forward_hooks = hooks = {1: print}
    after = read(layer, before)
    assert list(before.changes_to(after, frozenset())) == []
    put_back(layer, before, after)
    assert layer._forward_hooks is hooks


# --- which objects belong to a layer ---


def foreign(module: str) -> object:
    """An object of a class that says it lives in ``module``."""
    return type("Config", (), {"__module__": module})()


@pytest.mark.parametrize(
    "module",
    ["vllm.config", "vllm.config.model", "vllm.distributed.parallel_state", "transformers.models", "torch"],
)
def test_configs_and_infrastructure_are_no_helpers(module: str) -> None:
    layer, config = Layer(), foreign(module)
    config.inner = Plain(weight=torch.zeros(1))
    layer.config = config
    assert [path for path, _ in holders_of(layer)] == [""]


def test_a_package_that_only_begins_like_infrastructure_is_entered() -> None:
    layer = Layer()
    layer.helper = foreign("vllm.configurable_kernels")
    assert [path for path, _ in holders_of(layer)] == ["", "helper"]


def test_locks_functions_types_and_child_modules_are_not_entered() -> None:
    layer = Layer()
    layer.lock, layer.function, layer.cls = threading.Lock(), len, Plain
    layer.method, layer.dtype, layer.device = layer.forward, torch.float32, torch.device("cpu")
    assert [path for path, _ in holders_of(layer)] == [""]


def at_path(value: object, path: str) -> object:
    """What a path names: attributes, keys and indices joined by dots."""
    for name in path.split(".") if path else ():
        if isinstance(value, (list, dict)):
            value = value[int(name) if isinstance(value, list) else name]
        else:
            value = getattr(value, name)
    return value


def test_helpers_are_found_at_any_depth_each_once_with_a_path() -> None:
    layer, kernel = Layer(), Plain(weight=torch.zeros(1))
    layer.quant_method = Plain(kernel=kernel, scheme=Frozen(1.0, torch.zeros(1)))
    layer.kernels = [kernel, {"a": Slotted()}]
    kernel.owner = layer.quant_method
    found = dict(holders_of(layer))
    assert len({id(holder) for holder in found.values()}) == len(found)
    helpers = {id(layer.quant_method), id(layer.quant_method.scheme), id(kernel), id(layer.kernels[1]["a"])}
    assert helpers < {id(holder) for holder in found.values()}
    assert all(at_path(layer, path) is holder for path, holder in found.items())


# --- tensors behind a value ---


class Pair(NamedTuple):
    left: object
    right: object


def closing_over(value: object) -> Callable:
    return lambda: value


def with_defaults(value: object) -> Callable:
    def function(first: object = value, *, second: object = 2) -> None: ...

    return function


def with_keyword_default(value: object) -> Callable:
    def function(*, second: object = value) -> None: ...

    return function


def bound_to(value: object) -> Callable:
    class Owner:
        def method(self) -> None: ...

    owner = Owner()
    owner.value = value
    return owner.method


WRAPPERS = [
    closing_over,
    with_defaults,
    with_keyword_default,
    bound_to,
    lambda t: (1, t),
    lambda t: Pair("a", t),
    lambda t: [t],
    lambda t: {"a": t},
    lambda t: {t},
    lambda t: frozenset([t]),
    lambda t: functools.partial(print, t),
    lambda t: functools.partial(print, end=t),
    lambda t: functools.partial(closing_over(t)),
    lambda t: Plain(value=t),
    lambda t: Frozen(1.0, t),
]


@TRY
@given(st.lists(st.sampled_from(WRAPPERS[:8] + WRAPPERS[10:]), max_size=5), st.sampled_from(WRAPPERS))
def test_a_tensor_is_found_behind_any_wrapping(outer: list[Callable], inner: Callable) -> None:
    tensor = torch.zeros(2)
    value = inner(tensor)
    for wrap in outer:
        value = wrap(value)
    assert [id(t) for t in tensors_in(value)] == [id(tensor)]


def test_searching_values_that_hold_one_another_ends() -> None:
    a, b = Plain(weight=torch.zeros(1)), Plain(weight=torch.zeros(2))
    a.other, b.other = b, a
    assert [t.numel() for t in tensors_in(a)] == [1, 2]


def test_values_are_found_in_the_order_they_are_held_in_however_deep_they_lie() -> None:
    """Deeper than Python calls itself."""
    chain: list = [torch.zeros(1)]
    for _ in range(2 * sys.getrecursionlimit()):
        chain = [chain]
    both = [torch.zeros(2), {"a": chain, "b": (torch.zeros(3), [torch.zeros(4)])}, torch.zeros(5)]
    assert [t.numel() for t in tensors_in(both)] == [2, 1, 3, 4, 5]


def test_modules_and_configs_are_not_searched_for_tensors() -> None:
    config = foreign("vllm.config")
    config.weight = torch.zeros(1)
    values: Iterator = (Layer(), Layer().forward, config, 1, "a", None)
    assert list(tensors_in(values)) == []


# --- sameness ---


def test_plain_values_are_the_same_when_equal_and_others_when_identical() -> None:
    assert same(1.5, 1.5)
    assert same(torch.float16, torch.float16)
    assert not same(1, 1.0)
    assert not same(1, True)
    assert not same([1], [1])
    assert not same(torch.zeros(1), torch.zeros(1))
    layer = Layer()
    assert same(layer.forward, layer.forward)
