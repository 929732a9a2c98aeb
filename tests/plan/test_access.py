"""What an operator call reads and writes, told from its arguments alone."""

import pytest
import torch

from reload_plugin.plan.access import VIEWS, Access, Kind, access_of, on_meta
from reload_plugin.tensors import storage_id

ATEN = torch.ops.aten


def names(operands: object, **tensors: torch.Tensor) -> list[str]:
    """The names of the tensors that operands are, each with the identity of its storage."""
    found = []
    for tensor, key in operands:
        assert key == storage_id(tensor)
        found += [name for name, other in tensors.items() if other is tensor]
    return found


@pytest.fixture
def a() -> torch.Tensor:
    return torch.zeros(4)


@pytest.fixture
def b() -> torch.Tensor:
    return torch.ones(4)


def test_a_copy_writes_its_target_and_reads_its_source(a: torch.Tensor, b: torch.Tensor) -> None:
    access = access_of(ATEN.copy_.default, (a, b), {})
    assert access.kind is Kind.COPY
    assert (names(access.writes, a=a, b=b), names(access.reads, a=a, b=b)) == (["a"], ["b"])
    assert access.source.tensor is b
    assert access.result is a


def test_a_tensor_may_be_copied_to_itself(a: torch.Tensor) -> None:
    access = access_of(ATEN.copy_.default, (a, a), {})
    assert access.source.tensor is a
    assert access.reads == ()


@pytest.mark.parametrize(
    ("func", "rest", "kind", "value"),
    [
        (ATEN.zero_.default, (), Kind.ZERO, 0),
        (ATEN.fill_.Scalar, (2.5,), Kind.FILL, 2.5),
        (ATEN._local_scalar_dense.default, (), Kind.SCALAR, 0),
        (ATEN.neg.default, (), Kind.OTHER, 0),
    ],
)
def test_kinds(a: torch.Tensor, func: object, rest: tuple, kind: Kind, value: float) -> None:
    access = access_of(func, (a, *rest), {})
    assert (access.kind, access.value) == (kind, value)


def test_what_is_computed_reads_all_and_writes_nothing(a: torch.Tensor, b: torch.Tensor) -> None:
    access = access_of(ATEN.add.Tensor, (a, b), {})
    assert names(access.reads, a=a, b=b) == ["a", "b"]
    assert access.writes == ()


def test_a_result_that_is_given_as_a_keyword_is_written(a: torch.Tensor, b: torch.Tensor) -> None:
    out = torch.empty(4)
    access = access_of(ATEN.add.out, (a, b), {"out": out})
    assert names(access.writes, out=out) == ["out"]
    assert names(access.reads, a=a, b=b, out=out) == ["a", "b"]
    assert access.result is out


def test_lists_of_tensors_are_looked_into(a: torch.Tensor, b: torch.Tensor) -> None:
    targets = [torch.empty(4), torch.empty(4)]
    access = access_of(ATEN._foreach_copy_.default, (targets, [a, b]), {})
    assert [tensor for tensor, _ in access.writes] == targets
    assert names(access.reads, a=a, b=b) == ["a", "b"]
    assert names(access_of(ATEN.cat.default, ([a, b], 0), {}).reads, a=a, b=b) == ["a", "b"]


def test_views_of_one_memory_have_one_identity(a: torch.Tensor) -> None:
    access = access_of(ATEN.add.Tensor, (a[:2], a[2:]), {})
    assert len({key for _, key in access.reads}) == 1


@pytest.mark.parametrize("func", sorted(VIEWS, key=str))
def test_views_write_nothing_and_return_their_arguments_memory(func: object, a: torch.Tensor) -> None:
    square = a.view(2, 2)
    rest = {
        "aten.narrow.default": (0, 0, 1),
        "aten.permute.default": ((1, 0),),
        "aten.select.int": (0, 0),
        "aten.split.Tensor": (1,),
        "aten.squeeze.dim": (0,),
        "aten.transpose.int": (0, 1),
        "aten.unsqueeze.default": (0,),
        "aten.view.default": ((4,),),
    }.get(str(func), ())
    assert access_of(func, (square, *rest), {}).writes == ()
    out = func(square, *rest)
    for view in out if isinstance(out, (list, tuple)) else (out,):
        assert storage_id(view) == storage_id(a)


def test_what_moves_a_weight_without_values_leaves_it_on_meta(a: torch.Tensor) -> None:
    to_cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    meta = torch.empty(4, device="meta")
    moved = on_meta(access_of(ATEN._to_copy.default, (meta,), to_cpu), to_cpu)
    assert moved == {"device": torch.device("meta"), "dtype": torch.float32}
    assert on_meta(access_of(ATEN._to_copy.default, (a,), to_cpu), to_cpu) is to_cpu
    assert on_meta(Access(Kind.OTHER, ()), to_cpu) is to_cpu, "what is made of nothing has values"
