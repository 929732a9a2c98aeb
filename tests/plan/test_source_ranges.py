"""Which bytes of a tensor a rank reads: what is read is enough, and no more than it has to be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reload_plugin.device.ops import ops_for
from reload_plugin.plan import source_ranges
from reload_plugin.plan.copy_plan import StridedCopy, TensorPlan, copy_by_plan
from reload_plugin.plan.source import Region
from reload_plugin.record.tensor_layout import Geometry

WORD = torch.int16
OPS = ops_for(torch.device("cpu"))


def plan_of(
    shape: tuple[int, ...], *copies: tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, int]
) -> TensorPlan:
    """A plan of (target view, source view or value); the parameter is named after its storage's address."""
    made = []
    for target, source in copies:
        constant = not isinstance(source, torch.Tensor)
        made.append(
            StridedCopy(
                str(target.untyped_storage().data_ptr()),
                Geometry.of(target),
                target.dtype,
                None if constant else Geometry.of(source),
                target.dtype if constant else source.dtype,
                source if constant else 0,
            )
        )
    return TensorPlan(shape, WORD, tuple(made))


def weight(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=WORD).view(shape)


@pytest.fixture
def any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_ranges, "SHORTEST", 2)


def test_rows_are_one_range() -> None:
    one, part = weight(8, 6), torch.empty(4, 6, dtype=WORD)
    (found,) = source_ranges.regions_of(plan_of((8, 6), (part, one[4:])))
    assert (found.source, found.target, found.nbytes, found.runs) == (48, 0, 48, 1)


@pytest.mark.usefixtures("any_run")
def test_columns_are_a_run_in_each_row() -> None:
    one, part = weight(8, 6), torch.empty(8, 3, dtype=WORD)
    (found,) = source_ranges.regions_of(plan_of((8, 6), (part, one[:, 3:])))
    assert found[1:] == (6, 0, 6, 8, 12, 6)


def test_runs_that_are_too_short_are_read_with_what_lies_between() -> None:
    one, part = weight(8, 6), torch.empty(8, 3, dtype=WORD)
    plan = plan_of((8, 6), (part, one[:, 3:]))
    assert source_ranges.regions_of(plan) is None
    (found,) = source_ranges.needed_of(plan)
    assert (found.source, found.nbytes, found.runs) == (6, 90, 1), "from the first byte to the last"


def test_a_weight_of_another_rank_is_not_read() -> None:
    plan = TensorPlan((8, 6), WORD, ())
    assert source_ranges.regions_of(plan) == source_ranges.needed_of(plan) == ()


def test_what_the_loader_computes_is_read_whole() -> None:
    plan = TensorPlan((8, 6), WORD, None)
    assert source_ranges.regions_of(plan) is None
    assert source_ranges.needed_of(plan) is None


def test_padding_is_filled_in_and_only_the_rows_before_it_are_read() -> None:
    one, part = weight(8, 6), torch.empty(6, 6, dtype=WORD)
    plan = plan_of((8, 6), (part[:3], one[5:]), (part[3:], 0))
    assert source_ranges.regions_of(plan) is None, "a constant is not in the file"
    (found,) = source_ranges.needed_of(plan)
    assert (found.source, found.nbytes) == (60, 36)


def test_bytes_that_two_places_need_are_not_read_twice() -> None:
    one, first, second = weight(8, 6), torch.empty(8, 6, dtype=WORD), torch.empty(8, 6, dtype=WORD)
    plan = plan_of((8, 6), (first, one), (second, one))
    assert source_ranges.regions_of(plan) is None
    assert source_ranges.needed_of(plan) is None


SIDES = st.integers(1, 5)


@st.composite
def plans(draw: st.DrawFn) -> tuple[torch.Tensor, TensorPlan, dict[str, torch.Tensor]]:
    """A weight, a plan of some of its parts to parts of parameters, and the parameters by name."""
    shape = tuple(draw(st.lists(SIDES, min_size=1, max_size=3)))
    one = weight(*shape)
    copies, parameters = [], {}
    for _ in range(draw(st.integers(0, 3))):
        source = one
        for dim, size in enumerate(shape):
            start = draw(st.integers(0, size - 1))
            step = draw(st.sampled_from([1, 1, 1, 2]))
            source = source[(slice(None),) * dim + (slice(start, start + draw(SIDES) * step, step),)]
        whole = torch.full([size + draw(st.integers(0, 2)) for size in source.shape], -1, dtype=WORD)
        target = whole[tuple(slice(0, size) for size in source.shape)]
        if draw(st.booleans()):
            order = draw(st.permutations(range(source.dim())))
            source, target = source.permute(order), target.permute(order)
        copies.append((target, draw(st.sampled_from([source, source, source, 7]))))
        parameters[str(whole.untyped_storage().data_ptr())] = whole
    return one, plan_of(shape, *copies), parameters


def fill(into: torch.Tensor, regions: tuple[Region, ...], of: torch.Tensor) -> int:
    """Do as the reader of files does, into the memory of ``into``; how many bytes it read."""
    target, source = into.view(-1).view(torch.uint8), of.view(-1).view(torch.uint8)
    for region in regions:
        for run in range(region.runs):
            first = region.source + run * region.source_step
            place = region.target + run * region.target_step
            target[place : place + region.nbytes] = source[first : first + region.nbytes]
    return sum(region.total for region in regions)


@given(plans(), st.sampled_from([2, 4, 1000]))
@settings(max_examples=400, deadline=None)
def test_what_is_read_is_enough(
    drawn: tuple[torch.Tensor, TensorPlan, dict[str, torch.Tensor]], shortest: int
) -> None:
    one, plan, parameters = drawn
    before, source_ranges.SHORTEST = source_ranges.SHORTEST, shortest
    try:
        regions, needed = source_ranges.regions_of(plan), source_ranges.needed_of(plan)
    finally:
        source_ranges.SHORTEST = before
    expected = {name: memory.clone() for name, memory in parameters.items()}
    copy_by_plan(plan, one, lambda name: expected[name].untyped_storage(), OPS)
    if regions is not None:
        direct = {name: memory.clone() for name, memory in parameters.items()}
        for region in regions:
            fill(direct[region.parameter], (region,), one)
        assert all(torch.equal(direct[name], expected[name]) for name in expected)
        assert sum(region.total for region in regions) <= one.nbytes
    if needed is not None:
        partly = torch.full_like(one, -9)
        assert fill(partly, needed, one) < one.nbytes
        by_hand = {name: memory.clone() for name, memory in parameters.items()}
        copy_by_plan(plan, partly, lambda name: by_hand[name].untyped_storage(), OPS)
        assert all(torch.equal(by_hand[name], expected[name]) for name in expected)
