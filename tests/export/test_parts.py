"""Parts of tensors that ranks hold, and who writes which."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from reload_plugin import ExportError
from reload_plugin.export.parts import Box, OfferedTensor, RankOffer, _box, offered, share_out, slices
from reload_plugin.plan.source import TensorInfo
from reload_plugin.record.tensor_layout import Geometry


def test_a_view_of_a_tensor_is_the_box_it_was_cut_from() -> None:
    """Cut, permuted and flattened in any way that a loader may."""
    random.seed(0)
    for _ in range(500):
        shape = tuple(random.choice([1, 2, 3, 4]) for _ in range(random.choice([1, 2, 3])))
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        starts = tuple(random.randrange(size) for size in shape)
        sizes = tuple(random.randint(1, n - at) for n, at in zip(shape, starts, strict=True))
        cut = whole[slices(Box(starts, sizes))]
        view = cut.permute(random.sample(range(cut.dim()), cut.dim()))
        found = _box(Geometry.of(view), shape)
        assert found is not None
        assert torch.equal(whole[slices(found)], cut)
        if cut.is_contiguous():
            flat = _box(Geometry.of(cut.view(-1)), shape)
            assert flat is None or torch.equal(whole[slices(flat)].reshape(-1), cut.reshape(-1))


def test_a_view_that_is_no_box_is_told() -> None:
    whole = torch.arange(24).reshape(4, 6)
    assert _box(Geometry.of(whole[::2]), (4, 6)) is None
    assert _box(Geometry.of(whole.view(-1)[3:9]), (4, 6)) is None
    assert _box(Geometry.of(whole.diagonal()), (4, 6)) is None


def offer(value: float, *boxes: Box, shape: tuple[int, ...] = (4, 6), tier: str = "plan") -> OfferedTensor:
    return offered(TensorInfo("w", shape, torch.float32), tier, boxes, torch.full(shape, value))  # type: ignore[arg-type]


def shared(*offers: OfferedTensor | None):
    return share_out([RankOffer(tensors={} if one is None else {"w": one}) for one in offers])


UPPER, LOWER, WHOLE = Box((0, 0), (2, 6)), Box((2, 0), (2, 6)), Box((0, 0), (4, 6))


def test_each_part_has_one_owner() -> None:
    assert shared(offer(0, UPPER), offer(1, LOWER)).owned == ({"w": (UPPER,)}, {"w": (LOWER,)})
    assert shared(offer(0, WHOLE), offer(0, WHOLE)).owned == ({"w": (WHOLE,)}, {})
    assert shared(offer(0, UPPER), offer(0, UPPER, LOWER)).owned == ({"w": (UPPER,)}, {"w": (LOWER,)})
    assert shared(None, offer(0, WHOLE)).owned == ({}, {"w": (WHOLE,)})
    files = shared(offer(0, UPPER), offer(1, WHOLE, tier="source"))  # from a file, whatever is served
    assert files.owned == ({}, {"w": (WHOLE,)})
    assert files.tiers == {"w": "source"}


@pytest.mark.parametrize(
    ("offers", "why"),
    [
        ((offer(0, UPPER), None), "12 of 24"),
        ((offer(0, WHOLE), offer(1, WHOLE)), "different values"),
        ((offer(0, WHOLE), offer(0, LOWER)), "written twice"),
        ((offer(0, UPPER), offer(0, UPPER, shape=(4, 8))), r"rank 1 serves it as \[4, 8\]"),
    ],
)
def test_what_cannot_be_put_together_is_refused_by_name(
    offers: tuple[OfferedTensor | None, ...], why: str
) -> None:
    with pytest.raises(ExportError, match=why) as refused:
        shared(*offers)
    assert list(refused.value.tensors) == ["w"]


def test_all_shares_together_are_the_tensor() -> None:
    """Whatever ranks hold of it, some of it twice."""
    random.seed(1)
    rows = [Box((row, 0), (1, 6)) for row in range(4)]
    for _ in range(50):
        held = [random.sample(rows, random.randint(0, 4)) for _ in range(3)]
        offers = [offer(0, *boxes) if boxes else None for boxes in held]
        if set(itertools.chain(*held)) != set(rows):
            with pytest.raises(ExportError):
                shared(*offers)
            continue
        owned = [box for of_rank in shared(*offers).owned for box in of_rank.get("w", ())]
        assert sorted(box.starts for box in owned) == [box.starts for box in rows]
