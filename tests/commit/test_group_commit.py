"""New values into served objects: nothing is moved that can stay, nothing is kept that must go."""

import functools
import gc
import itertools
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from reload_plugin.commit.compare import plan_commit
from reload_plugin.commit.group_commit import Commit
from reload_plugin.process.native_handles import release_native_memory
from reload_plugin.record.group_state import GroupState, TensorState
from reload_plugin.record.late_bound import LateBound
from reload_plugin.record.module_state import tensors_in
from reload_plugin.record.snapshot import read
from reload_plugin.tensors import storage_id


class Helper:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class Pair(NamedTuple):
    scale: float
    weight: torch.Tensor


def plan(served: object, twin: object, captured: tuple[torch.Tensor, ...] = ()) -> Commit:
    """The commit that makes ``served`` hold the values of ``twin``, which stands for its result."""
    staged = types.SimpleNamespace(
        group=types.SimpleNamespace(name="layer"),
        served=GroupState([(served, read(served))], {}),
        result=GroupState([(served, read(twin))], {}),
        captured=list(captured),
        overwritten=set(),
    )
    return plan_commit(staged, LateBound())


def commit(served: object, twin: object) -> Commit:
    planned = plan(served, twin)
    planned.apply()
    return planned


def old(*shape: int) -> torch.Tensor:
    return torch.zeros(shape or (3,))


def new(*shape: int) -> torch.Tensor:
    return torch.ones(shape or (3,))


class Kept:
    """Remembers an object and an address, to see that both are still there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.address = tensor, tensor.data_ptr()

    def holds(self, held: object, values: torch.Tensor) -> bool:
        in_place = held is self.tensor and held.data_ptr() == self.address
        return in_place and torch.equal(held, values)


# --- tensors ---


def wrapped_in(wrap: Callable[[torch.Tensor], object]) -> tuple[Helper, Helper, Kept]:
    kept = Kept(old())
    return Helper(value=wrap(kept.tensor)), Helper(value=wrap(new())), kept


WRAPPERS: dict[str, Callable[[torch.Tensor], object]] = {
    "tensor": lambda t: t,
    "list": lambda t: [1, t],
    "dict": lambda t: {"a": t},
    "tuple": lambda t: (1, t),
    "named tuple": lambda t: Pair(1.0, t),
    "helper": lambda t: Helper(weight=t),
    "closure": lambda t: lambda: t,
    "partial": lambda t: functools.partial(max, t),
    "partial with keyword": lambda t: functools.partial(max, key=t),
    "bound method": lambda t: types.MethodType(read, Helper(weight=t)),
    "nested": lambda t: [functools.partial(max, (lambda: t), {"a": (Helper(weight=t),)})],
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_same_objects_at_the_same_addresses_with_new_values(wrap: Callable) -> None:
    served, twin, kept = wrapped_in(wrap)
    value = served.value
    done = commit(served, twin)
    assert served.value is value
    assert {id(t) for t in tensors_in(value)} == {id(kept.tensor)}
    assert kept.holds(next(tensors_in(value)), new())
    assert not done.writes
    assert not done.moves


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_planning_alone_changes_nothing(wrap: Callable) -> None:
    served, twin, kept = wrapped_in(wrap)
    value = served.value
    plan(served, twin)
    assert served.value is value
    assert kept.holds(next(tensors_in(value)), old())


def test_parameters_and_buffers_of_a_module_stay_where_they_are() -> None:
    served, twin = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    twin.load_state_dict({name: torch.ones_like(t) * 5 for name, t in twin.state_dict().items()})
    kept = {name: Kept(t) for name, t in [*served.named_parameters(), *served.named_buffers()]}
    commit(served, twin)
    after = dict([*served.named_parameters(), *served.named_buffers()])
    assert kept.keys() == after.keys()
    assert all(kept[name].holds(after[name], torch.ones_like(after[name]) * 5) for name in after)


def test_one_object_with_two_states_gets_the_values_of_the_later_one() -> None:
    weight = torch.ones(3)
    layer, result = Helper(weight=weight), TensorState.of(weight)
    weight.data = torch.zeros(3)
    address = weight.data_ptr()
    staged = types.SimpleNamespace(
        group=types.SimpleNamespace(name="layer"),
        served=GroupState([(layer, read(layer))], {id(weight): TensorState.of(weight)}),
        result=GroupState([(layer, read(layer))], {id(weight): result}),
        captured=[],
        overwritten=set(),
    )
    plan_commit(staged, LateBound()).apply()
    assert layer.weight is weight
    assert weight.data_ptr() == address
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize(
    "twin",
    [new(4), new(3, 1), new().to(torch.int8), torch.ones(3, 3).t()[0], torch.ones(6)[::2]],
    ids=["size", "rank", "dtype", "view", "stride"],
)
def test_a_changed_layout_moves_the_memory_and_keeps_the_object(twin: torch.Tensor) -> None:
    weight = old()
    served = Helper(weight=weight)
    planned = commit(served, Helper(weight=twin))
    assert served.weight is weight
    assert torch.equal(weight, twin)
    assert weight.dtype == twin.dtype
    assert weight.stride() == twin.stride()
    assert [path for _, _, path in planned.moves] == ["layer.weight"]
    assert not planned.copies


def test_a_tensor_that_nobody_changed_costs_nothing() -> None:
    weight = old()
    planned = plan(Helper(weight=weight), Helper(weight=weight))
    assert [planned.copies, planned.moves, planned.writes, planned.tensor_attributes] == [[], [], [], []]


def test_the_class_and_the_attributes_of_a_tensor_follow_the_result() -> None:
    class Packed(nn.Parameter):
        pass

    weight, twin = nn.Parameter(old(), requires_grad=False), nn.Parameter(new(), requires_grad=False)
    weight.gone, weight.kept = 1, "same"
    twin.kept, twin.added, twin.__class__ = "same", 2, Packed
    served = Helper(weight=weight)
    commit(served, Helper(weight=twin))
    assert served.weight is weight
    assert type(weight) is Packed
    assert vars(weight) == {"kept": "same", "added": 2}


# --- aliases ---


def test_one_tensor_under_two_names_stays_one() -> None:
    kept, twin = Kept(old()), new()
    served = Helper(a=kept.tensor, b=[kept.tensor])
    commit(served, Helper(a=twin, b=[twin]))
    assert served.b[0] is served.a
    assert kept.holds(served.a, new())


def test_a_view_of_another_tensor_stays_its_view() -> None:
    base, twin = old(4), new(4)
    served = Helper(whole=base, part=base[1:3])
    part = Kept(served.part)
    commit(served, Helper(whole=twin, part=twin[1:3]))
    assert part.holds(served.part, new(2))
    base[1] = 9
    assert served.part[0] == 9


def test_two_names_that_get_different_tensors_do_not_overwrite_one_another() -> None:
    kept = Kept(old())
    served = Helper(a=kept.tensor, b=kept.tensor)
    commit(served, Helper(a=new(), b=new() * 2))
    assert kept.holds(served.a, new())
    assert torch.equal(served.b, new() * 2)


def test_an_object_under_two_names_stays_one() -> None:
    shared, twin = Helper(weight=old(), scale=1), Helper(weight=new(), scale=2)
    served = Helper(a=shared, b=shared)
    commit(served, Helper(a=twin, b=twin))
    assert served.a is served.b is shared
    assert shared.scale == 2


def test_comparing_objects_that_hold_one_another_ends() -> None:
    served, twin = Helper(inner=Helper(weight=old())), Helper(inner=Helper(weight=new()))
    served.inner.owner, twin.inner.owner = served.inner, twin.inner
    commit(served, twin)
    assert served.inner.owner is served.inner
    assert torch.equal(served.inner.weight, new())


# --- plain values ---


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), (0.5, 0.25), ("a", "b"), (None, 3), (3, None), (True, False), (torch.int8, torch.float16)],
)
def test_plain_values_are_replaced(before: object, after: object) -> None:
    served = Helper(value=before, inner=Helper(value=before), many=[before], named={"a": before})
    inner, many, named = served.inner, served.many, served.named
    commit(served, Helper(value=after, inner=Helper(value=after), many=[after], named={"a": after}))
    assert served.value == inner.value == many[0] == named["a"] == after
    assert (served.inner, served.many, served.named) == (inner, many, named)


def test_attributes_are_added_and_removed() -> None:
    weight = new()
    served = Helper(gone=1, kept=2, inner=Helper(gone=1), named={"gone": 1}, many=[1, 2, 3])
    twin = Helper(kept=2, added=weight, inner=Helper(added=3), named={"added": 4}, many=[1])
    commit(served, twin)
    assert vars(served).keys() == {"kept", "added", "inner", "named", "many"}
    assert served.added is weight
    assert vars(served.inner) == {"added": 3}
    assert (served.named, served.many) == ({"added": 4}, [1])


def test_a_parameter_that_becomes_a_buffer_changes_its_table() -> None:
    served, twin = nn.Module(), nn.Module()
    served.weight = nn.Parameter(old(), requires_grad=False)
    twin.register_buffer("weight", new(), persistent=False)
    commit(served, twin)
    assert not served._parameters
    assert torch.equal(served.weight, new())
    assert served._non_persistent_buffers_set == {"weight"}


def test_an_object_of_another_class_is_replaced() -> None:
    twin = Pair(2.0, new())
    served = Helper(value=Helper(weight=old()))
    commit(served, Helper(value=twin))
    assert served.value is twin


# --- closures, partials, tuples ---


def multiply_by(scale: float, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: weight * scale


def test_a_served_closure_computes_with_the_new_values() -> None:
    function = multiply_by(2.0, old())
    kept = Kept(next(tensors_in(function)))
    served = Helper(apply=function)
    commit(served, Helper(apply=multiply_by(3.0, new())))
    assert served.apply is function
    assert torch.equal(function(), new() * 3)
    assert kept.holds(next(tensors_in(function)), new())


def test_closure_cells_change_only_in_the_commit() -> None:
    function = multiply_by(2.0, old())
    planned = plan(Helper(apply=function), Helper(apply=multiply_by(3.0, new())))
    assert torch.equal(function(), old())
    assert len(planned.cells) == 1


def test_a_function_of_other_code_is_replaced() -> None:
    function = multiply_by(3.0, new())
    served = Helper(apply=lambda: 0)
    commit(served, Helper(apply=function))
    assert served.apply is function


@pytest.mark.parametrize("keyword", [False, True])
def test_a_partial_with_another_value_still_holds_the_served_tensor(keyword: bool) -> None:
    def make(scale: float, weight: torch.Tensor) -> functools.partial:
        return functools.partial(max, weight, key=scale) if keyword else functools.partial(max, weight, scale)

    kept = Kept(old())
    served = Helper(apply=make(1.0, kept.tensor))
    commit(served, Helper(apply=make(2.0, new())))
    apply = served.apply
    assert kept.holds(apply.args[0], new())
    assert (apply.keywords.get("key") if keyword else apply.args[1]) == 2.0


@pytest.mark.parametrize("cls", [Pair, lambda scale, weight: (scale, weight)], ids=["named", "plain"])
def test_a_tuple_with_another_value_is_a_new_one_of_its_class(cls: Callable) -> None:
    kept = Kept(old())
    served = Helper(value=cls(1.0, kept.tensor))
    before = type(served.value)
    commit(served, Helper(value=cls(2.0, new())))
    assert type(served.value) is before
    assert served.value[0] == 2.0
    assert kept.holds(served.value[1], new())


def test_a_method_stays_bound_to_the_served_object() -> None:
    class Owner(Helper):
        def answer(self) -> torch.Tensor:
            return self.weight * self.scale

    owner = Owner(weight=old(), scale=2)
    served = Helper(apply=owner.answer)
    method = served.apply
    commit(served, Helper(apply=Owner(weight=new(), scale=3).answer))
    assert served.apply is method
    assert method.__self__ is owner
    assert torch.equal(method(), new() * 3)


# --- owners of native resources ---


class Pool:
    """Hands out handles and counts how often each one is given back."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.released: list[int] = []

    def owner(self, weight: torch.Tensor) -> "Owner":
        return Owner(self, next(self._numbers), weight)


class Owner:
    """Owns a handle as vLLM's oneDNN handlers do: it goes back when the object goes."""

    def __init__(self, pool: Pool, handle: int, weight: torch.Tensor) -> None:
        self.pool, self.handle, self.weight = pool, handle, weight

    def __del__(self) -> None:
        self.pool.released.append(self.handle)


def test_an_owner_gets_the_new_resource_and_the_old_one_is_released_once() -> None:
    pool = Pool()
    owner = pool.owner(old())
    kept = Kept(owner.weight)
    served = Helper(handler=owner)
    planned = commit(served, Helper(handler=pool.owner(new())))
    assert served.handler is owner
    assert owner.handle == 2
    assert kept.holds(owner.weight, new())
    del planned
    gc.collect()
    assert pool.released == [1]
    del owner, served
    gc.collect()
    assert pool.released == [1, 2]


def test_an_owner_whose_commit_is_dropped_keeps_its_resource() -> None:
    pool = Pool()
    served = Helper(handler=pool.owner(old()))
    planned = plan(served, Helper(handler=pool.owner(new())))
    assert pool.released == []
    del planned
    gc.collect()
    assert pool.released == [2]
    assert served.handler.handle == 1
    assert torch.equal(served.handler.weight, old())


def test_ten_reloads_release_ten_resources() -> None:
    pool = Pool()
    served = Helper(handler=pool.owner(old()))
    for step in range(10):
        commit(served, Helper(handler=pool.owner(new() * step)))
    gc.collect()
    assert pool.released == list(range(1, 11))
    assert served.handler.handle == 11


class Handler:
    """Owns a handle that is kept as a number in a tensor, which compiled code holds too."""

    def __init__(self, released: list[int], handle: int) -> None:
        self.released, self.handle = released, torch.tensor(handle)

    def __del__(self) -> None:
        self.released.append(int(self.handle))


def test_released_native_memory_is_freed_once_and_its_owner_is_kept() -> None:
    released: list[int] = []
    handler, stranger = Handler(released, 7), Handler(released, 9)
    number, handles = handler.handle, {7: b"digest", 8: None}
    served = Helper(handler=handler, other=stranger)
    assert release_native_memory([served, "plain", handler], handles)
    assert (released, handles, int(number)) == ([7], {8: None}, 0)
    assert int(stranger.handle) == 9, "nobody knows what that number is"
    assert not release_native_memory([served], handles), "there is nothing more"
    planned = commit(served, Helper(handler=Handler(released, 8), other=stranger))
    del planned
    gc.collect()
    assert served.handler is handler
    assert handler.handle is number
    assert (released, int(number)) == ([7, 0], 8), "the twin has the null handle"


def test_an_owner_whose_tensor_changed_its_layout_holds_the_new_one() -> None:
    pool, weight = Pool(), new(5)
    served = Helper(handler=pool.owner(old()))
    commit(served, Helper(handler=pool.owner(weight)))
    assert served.handler.weight is weight


def test_memory_that_native_code_was_given_is_kept_while_it_is_held() -> None:
    held, forgotten = new(), new()
    planned = plan(Helper(weight=old()), Helper(weight=held), captured=(held, forgotten))
    assert [id(t) for t in planned.native] == [id(held)]


# --- what a commit keeps alive ---


def test_only_what_is_served_afterwards_needs_the_new_memory() -> None:
    copied, moved, written = new(), new(7), new()
    planned = plan(Helper(a=old(), b=old()), Helper(a=copied, b=moved, c=[written]))
    keys = {storage_id(t) for t in (copied, moved, written)}
    assert planned.kept_storages(applied=False) == keys
    assert planned.kept_storages(applied=True) == keys - {storage_id(copied)}
    assert planned.nbytes_beside(types.SimpleNamespace(storages=[])) == copied.nbytes
