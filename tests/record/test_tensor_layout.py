"""Regions of a tensor, against the mask of the elements that were really touched."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reload_plugin.record.coverage import Box, Coverage, box_of
from reload_plugin.record.tensor_layout import Geometry

TRY = settings(deadline=None, database=None, max_examples=200)
SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=4)
MOVES = ("narrow", "select", "transpose", "flatten", "split")


def moved(draw: st.DrawFn, move: str, view: torch.Tensor) -> torch.Tensor:
    """One step of what weight loaders do to a parameter; a step that is impossible is left out."""
    if not view.dim():
        return view
    dim = draw(st.integers(0, view.dim() - 1))
    size = view.shape[dim]
    if move == "narrow":
        start = draw(st.integers(0, size - 1))
        return view.narrow(dim, start, draw(st.integers(1, size - start)))
    if move == "select":
        return view.select(dim, draw(st.integers(0, size - 1)))
    if move == "transpose":
        return view.transpose(dim, draw(st.integers(0, view.dim() - 1)))
    if move == "split":
        return draw(st.sampled_from(view.split(draw(st.integers(1, size)), dim)))
    flat = view.flatten(dim, draw(st.integers(dim, view.dim() - 1)))
    return flat if flat.data_ptr() == view.data_ptr() else view


@st.composite
def bases(draw: st.DrawFn) -> torch.Tensor:
    """A contiguous tensor, alone or somewhere inside a larger storage."""
    shape = draw(SHAPES)
    before, behind = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    numel = int(torch.tensor(shape).prod()) if shape else 1
    return torch.zeros(before + numel + behind)[before : before + numel].view(shape)


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor, moves: tuple[str, ...] = MOVES) -> torch.Tensor:
    view = base
    for move in draw(st.lists(st.sampled_from(moves), max_size=5)):
        view = moved(draw, move, view)
    return view


def touched_by(view: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Which elements of ``base`` a write to ``view`` reaches."""
    base.zero_()
    view.fill_(1)
    mask = base.bool()
    base.zero_()
    return mask


def mask_of(box: Box, base: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(base.shape, dtype=torch.bool)
    mask[tuple(slice(start, stop) for start, stop in box)] = True
    return mask


@TRY
@given(st.data())
def test_a_box_is_exactly_what_was_touched(data: st.DataObject) -> None:
    base = data.draw(bases())
    view = data.draw(views(base))
    box = box_of(Geometry.of(view), Geometry.of(base))
    if box is not None:
        assert torch.equal(mask_of(box, base), touched_by(view, base))


@TRY
@given(st.data())
def test_narrowed_selected_and_transposed_views_are_always_boxes(data: st.DataObject) -> None:
    base = data.draw(bases())
    view = data.draw(views(base, ("narrow", "select", "transpose", "split")))
    assert box_of(Geometry.of(view), Geometry.of(base)) is not None


@TRY
@given(st.data())
def test_the_order_of_a_bases_dimensions_in_memory_does_not_matter(data: st.DataObject) -> None:
    base = data.draw(bases())
    base = base.permute(data.draw(st.permutations(range(base.dim()))))
    view = data.draw(views(base))
    box = box_of(Geometry.of(view), Geometry.of(base))
    if box is not None:
        assert torch.equal(mask_of(box, base), touched_by(view, base))


@pytest.mark.parametrize("view", [slice(None, None, 2), slice(1, None, 3)], ids=["every 2nd", "every 3rd"])
def test_a_view_with_steps_is_no_box(view: slice) -> None:
    base = torch.zeros(8, 3)
    assert box_of(Geometry.of(base[view]), Geometry.of(base)) is None


def test_merged_dimensions_are_the_box_they_merge() -> None:
    base = torch.zeros(3, 4, 5)
    flat = base[1].flatten()
    assert box_of(Geometry.of(flat), Geometry.of(base)) == ((1, 2), (0, 4), (0, 5))
    assert box_of(Geometry.of(base.flatten()[20:]), Geometry.of(base)) == ((1, 3), (0, 4), (0, 5))
    assert box_of(Geometry.of(base.flatten()[15:55]), Geometry.of(base)) is None


def gap_in(text: str) -> Box:
    return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+):(\d+)", text))


def covered(data: st.DataObject, base: torch.Tensor) -> tuple[Coverage, torch.Tensor, bool]:
    """Some writes: their coverage, their mask, and whether any of them met another."""
    coverage, mask, met = Coverage(Geometry.of(base)), torch.zeros(base.shape, dtype=torch.bool), False
    for _ in range(data.draw(st.integers(0, 6))):
        view = data.draw(views(base))
        coverage.add(Geometry.of(view))
        touched = touched_by(view, base)
        met |= bool((mask & touched).any())
        mask |= touched
        if data.draw(st.booleans()):
            assert coverage.complete == bool(mask.all())
    return coverage, mask, met


@TRY
@given(st.data())
def test_complete_means_that_every_element_was_written(data: st.DataObject) -> None:
    coverage, mask, _ = covered(data, data.draw(bases()))
    assert coverage.complete == bool(mask.all())
    assert coverage.touched == bool(mask.any())


@TRY
@given(st.data())
def test_a_gap_names_elements_that_nobody_wrote(data: st.DataObject) -> None:
    base = data.draw(bases())
    coverage, mask, _ = covered(data, base)
    assume(not mask.all())
    text = coverage.describe_gap()
    if not mask.any():
        assert text == "nothing was sent for it"
        return
    assert text.endswith(f"of {list(base.shape)} was not sent")
    gap = mask_of(gap_in(text), base)
    assert gap.any()
    assert not (gap & mask).any()


@TRY
@given(st.data())
def test_an_overlap_is_never_invented(data: st.DataObject) -> None:
    coverage, _, met = covered(data, data.draw(bases()))
    assert met or not coverage.overlaps


@TRY
@given(st.data())
def test_the_same_box_twice_is_an_overlap(data: st.DataObject) -> None:
    base = data.draw(bases())
    view = Geometry.of(data.draw(views(base, ("narrow", "select", "transpose"))))
    coverage = Coverage(Geometry.of(base))
    coverage.add(view)
    assert not coverage.overlaps
    coverage.add(view)
    assert coverage.overlaps


@TRY
@given(st.data())
def test_writing_after_the_last_element_is_an_overlap(data: st.DataObject) -> None:
    base = data.draw(bases())
    coverage = Coverage(Geometry.of(base))
    coverage.add_all()
    assert coverage.complete
    coverage.add(Geometry.of(data.draw(views(base, ("narrow", "select", "transpose")))))
    assert coverage.overlaps
    assert coverage.complete


def test_as_many_elements_as_there_are_is_not_yet_complete() -> None:
    """Accounting is by identity: two writes to one half have the size of the whole."""
    base = torch.zeros(4, 6)
    coverage = Coverage(Geometry.of(base))
    coverage.add(Geometry.of(base[:3]))
    coverage.add(Geometry.of(base[1:3, :]))
    assert coverage.volume > base.numel()
    assert not coverage.complete
    assert coverage.describe_gap() == "[3:4, 0:6] of [4, 6] was not sent"


def test_a_tensor_without_elements_is_complete() -> None:
    assert Coverage(Geometry.of(torch.zeros(0, 3))).complete


@TRY
@given(st.data())
def test_a_geometry_finds_its_view_again(data: st.DataObject) -> None:
    base = data.draw(bases())
    view = data.draw(views(base))
    again = Geometry.of(view).view(base)
    assert again.data_ptr() == view.data_ptr()
    assert Geometry.of(again) == Geometry.of(view)
    assert Geometry.of(view).numel == view.numel()
