"""What a loader did with a weight, done again without it: the same memory."""

import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reload_plugin.device.ops import ops_for
from reload_plugin.plan.copy_plan import CopyPlan, TensorPlan, copy_by_plan
from reload_plugin.plan.mismatches import Mismatches
from reload_plugin.plan.tracer import LoadTrace
from reload_plugin.record.model_record import TensorRecord
from reload_plugin.record.staged_storage import StagedStorage
from reload_plugin.record.tensor_layout import Constant, Geometry, TensorFormat

TRY = settings(deadline=None, database=None, max_examples=100)
OPS = ops_for(torch.device("cpu"))
UNTOUCHED = 7.0
"""What staging holds before anything is loaded."""

Loader = Callable[[dict[str, torch.Tensor], torch.Tensor], object]


class Memory:
    """Staging of some parameters, as a reload allocates it."""

    def __init__(self, **parameters: torch.Tensor) -> None:
        self._alive = parameters
        self.storages = {name: self._staged(name, like) for name, like in parameters.items()}

    def _staged(self, name: str, like: torch.Tensor) -> StagedStorage:
        geometry, initial = Geometry.of(like), Constant(UNTOUCHED)
        fmt = TensorFormat(name, geometry, like.dtype, torch.device("cpu"), torch.Tensor, False, {}, initial)
        record = TensorRecord(fmt, 0, weakref.ref(like), True, "layer")
        return StagedStorage([record], torch.device("cpu"))

    @property
    def views(self) -> dict[str, torch.Tensor]:
        return {name: next(iter(storage.views.values())) for name, storage in self.storages.items()}

    def of(self, name: str) -> torch.UntypedStorage:
        self.storages[name].materialise()
        return self.storages[name].storage

    def contents(self) -> dict[str, bytes]:
        return {name: bytes(self.of(name).tolist()) for name in self.storages}


def learn(
    memory: Memory, loader: Loader, weight: torch.Tensor, dry: bool = False
) -> tuple[TensorPlan, LoadTrace]:
    """The tensor plan of one weight, learnt while ``loader`` loads it into ``memory``."""
    trace = LoadTrace(Mismatches(), dry)
    trace.watch(memory.storages.values())
    with trace:
        trace.begin("weight", weight)
        loader(memory.views, weight)
        trace.end()
    return trace.loaded.tensor_plans["weight"], trace


def loaded(parameters: dict[str, torch.Tensor], loader: Loader, weight: torch.Tensor) -> dict[str, bytes]:
    """What the loader itself leaves in memory, watched by nobody."""
    memory = Memory(**parameters)
    for name in parameters:
        memory.of(name)
    loader(memory.views, weight)
    return memory.contents()


def copied(
    parameters: dict[str, torch.Tensor], tensor_plan: TensorPlan, weight: torch.Tensor
) -> dict[str, bytes]:
    memory = Memory(**parameters)
    copy_by_plan(tensor_plan, weight, memory.of, OPS)
    return memory.contents()


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


# --- random loaders ---


@st.composite
def parts(draw: st.DrawFn, view: torch.Tensor) -> tuple[list[tuple[str, tuple[int, ...]]], torch.Tensor]:
    """Some narrowing, selecting and transposing, as steps that can be applied again."""
    steps: list[tuple[str, tuple[int, ...]]] = []
    for move in draw(st.lists(st.sampled_from(("narrow", "select", "transpose")), max_size=4)):
        if not view.dim():
            break
        dim = draw(st.integers(0, view.dim() - 1))
        if move == "transpose":
            arguments = (dim, draw(st.integers(0, view.dim() - 1)))
        elif move == "select":
            arguments = (dim, draw(st.integers(0, view.shape[dim] - 1)))
        else:
            start = draw(st.integers(0, view.shape[dim] - 1))
            arguments = (dim, start, draw(st.integers(1, view.shape[dim] - start)))
        steps.append((move, arguments))
        view = getattr(view, move)(*arguments)
    return steps, view


def apply(steps: list[tuple[str, tuple[int, ...]]], tensor: torch.Tensor) -> torch.Tensor:
    for move, arguments in steps:
        tensor = getattr(tensor, move)(*arguments)
    return tensor


FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], Loader, tuple[int, ...], torch.dtype]:
    """Parameters, a loader of parts of one weight into them, and the weight's shape and dtype."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dtype, parameters, copies = draw(FLOATS), {}, []
    for index in range(draw(st.integers(1, 3))):
        steps, part = draw(parts(torch.empty(shape, device="meta")))
        margins = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in part.shape]
        destinations = tuple(
            before + n + behind for n, (before, behind) in zip(part.shape, margins, strict=True)
        )
        order = draw(st.permutations(range(len(destinations))))
        name = f"parameter_{index}"
        parameters[name] = torch.empty([destinations[d] for d in order], dtype=draw(FLOATS))
        copies.append((name, steps, order, margins, tuple(part.shape)))

    def loader(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        for name, steps, order, margins, size in copies:
            target = views[name].permute([order.index(d) for d in range(len(order))])
            for dim, (before, _) in enumerate(margins):
                target = target.narrow(dim, before, size[dim])
            target.copy_(apply(steps, weight))

    return parameters, loader, shape, dtype


@TRY
@given(cases())
def test_following_a_tensor_plan_gives_what_the_loader_gives(case: tuple) -> None:
    parameters, loader, shape, dtype = case
    tensor_plan, _ = learn(Memory(**parameters), loader, torch.ones(shape).to(dtype))
    other = random(shape, dtype)
    assert copied(parameters, tensor_plan, other) == loaded(parameters, loader, other)


@TRY
@given(cases())
def test_watching_a_loader_does_not_change_what_it_does(case: tuple) -> None:
    parameters, loader, shape, dtype = case
    memory, weight = Memory(**parameters), random(shape, dtype)
    learn(memory, loader, weight)
    assert memory.contents() == loaded(parameters, loader, weight)


@TRY
@given(cases())
def test_a_tensor_plan_learnt_without_any_values_is_the_same(case: tuple) -> None:
    parameters, loader, shape, dtype = case
    tensor_plan, _ = learn(Memory(**parameters), loader, torch.ones(shape).to(dtype))
    memory = Memory(**parameters)
    dry, _ = learn(memory, loader, torch.empty(shape, dtype=dtype, device="meta"), dry=True)
    assert dry == tensor_plan
    assert not any(storage.materialised for storage in memory.storages.values())


def inside_another(weight: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(weight.numel() + 3, dtype=weight.dtype)
    whole[2:-1] = weight.flatten()
    return whole[2:-1].view(weight.shape)


def every_second(weight: torch.Tensor) -> torch.Tensor:
    return torch.stack([weight, torch.zeros_like(weight)], -1)[..., 0]


def turned(weight: torch.Tensor) -> torch.Tensor:
    dims = list(range(weight.dim()))[::-1]
    return weight.permute(dims).contiguous().permute(dims)


def with_gradient(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().requires_grad_() if weight.dtype == torch.float32 else weight


@pytest.mark.parametrize("layout", [inside_another, every_second, turned, with_gradient])
@TRY
@given(case=cases())
def test_the_layout_of_a_weight_does_not_matter(layout: Callable, case: tuple) -> None:
    parameters, loader, shape, dtype = case
    tensor_plan, _ = learn(Memory(**parameters), loader, torch.ones(shape).to(dtype))
    weight = random(shape, dtype)
    assert copied(parameters, tensor_plan, layout(weight)) == loaded(parameters, loader, weight)


@pytest.mark.parametrize("lazy", [torch.conj, torch._neg_view])
def test_weights_that_are_conjugated_or_negated_later_are_so_at_once(lazy: Callable) -> None:
    parameters = {"p": torch.empty(4, dtype=torch.complex64)}

    def loader(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        views["p"].copy_(weight)

    tensor_plan, _ = learn(Memory(**parameters), loader, torch.zeros(4, dtype=torch.complex64))
    weight = lazy(torch.complex(random((4,)), random((4,))))
    assert copied(parameters, tensor_plan, weight) == loaded(parameters, loader, weight)


# --- single writes ---


def copy_all(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    views["p"].copy_(weight)


@pytest.mark.parametrize("numel", [0, 1, 1023, (4 << 20) // 4, (4 << 20) // 4 + 1])
def test_weights_of_every_size_arrive(numel: int) -> None:
    parameters = {"p": torch.empty(numel)}
    tensor_plan, _ = learn(Memory(**parameters), copy_all, torch.empty(numel))
    memory, weight = Memory(**parameters), random((numel,))
    copy_by_plan(tensor_plan, weight, memory.of, OPS)
    assert torch.equal(memory.views["p"], weight)


def test_a_scalar_arrives() -> None:
    tensor_plan, _ = learn(Memory(p=torch.empty(())), copy_all, torch.empty(()))
    memory = Memory(p=torch.empty(()))
    copy_by_plan(tensor_plan, torch.tensor(2.5), memory.of, OPS)
    assert memory.views["p"].item() == 2.5


def test_bytes_are_taken_as_they_are_where_the_loader_does() -> None:
    parameters = {"p": torch.empty(8, dtype=torch.uint8)}

    def loader(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        views["p"].copy_(weight.view(torch.uint8))

    weight = random((8,), torch.float8_e4m3fn)
    tensor_plan, _ = learn(Memory(**parameters), loader, weight)
    assert copied(parameters, tensor_plan, weight)["p"] == bytes(weight.view(torch.uint8).tolist())


@pytest.mark.parametrize("value", [0, 1.5, -3])
def test_a_constant_beside_the_weight_is_written_again(value: float) -> None:
    parameters = {"p": torch.empty(4, 3)}

    def loader(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        views["p"][:2].copy_(weight)
        views["p"][2:].fill_(value)

    tensor_plan, _ = learn(Memory(**parameters), loader, torch.ones(2, 3))
    other = random((2, 3))
    assert copied(parameters, tensor_plan, other) == loaded(parameters, loader, other)
    assert [write.source is None for write in tensor_plan.copies] == [False, True]


def test_later_writes_win_as_they_did() -> None:
    parameters = {"p": torch.empty(4)}

    def loader(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        views["p"].zero_()
        views["p"][1:3].copy_(weight[:2])
        views["p"][2:].copy_(weight[2:])

    tensor_plan, _ = learn(Memory(**parameters), loader, torch.ones(4))
    other = random((4,))
    assert copied(parameters, tensor_plan, other) == loaded(parameters, loader, other)


def negative_exponential(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    views["p"].copy_(-torch.exp(weight))


def by_value(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    views["p"].fill_(weight[0].item())


def in_place(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    views["p"].add_(weight)


def through_a_cast(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    views["p"].copy_(weight.to(torch.float16))


def rearranged(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    views["p"].copy_(weight.flip(0))


def partly_computed(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    views["p"][:2].copy_(weight[:2])
    views["p"][2:].copy_(weight[2:] + 1)


def from_elsewhere(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    views["p"].copy_(torch.arange(4.0))


COMPUTED = [
    negative_exponential,
    by_value,
    in_place,
    through_a_cast,
    rearranged,
    partly_computed,
    from_elsewhere,
]


@pytest.mark.parametrize("loader", COMPUTED)
def test_what_is_computed_has_no_copies(loader: Loader) -> None:
    tensor_plan, trace = learn(Memory(p=torch.empty(4)), loader, random((4,)))
    assert tensor_plan.copies is None
    assert CopyPlan(None, trace.loaded.tensor_plans).computed == 1
    with pytest.raises(AssertionError, match="loader"):
        copy_by_plan(tensor_plan, random((4,)), Memory(p=torch.empty(4)).of, OPS)


def passing_over(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    weight.sum()


def test_what_the_loader_passes_over_has_an_empty_tensor_plan() -> None:
    memory = Memory(p=torch.empty(4))
    tensor_plan, trace = learn(memory, passing_over, random((4,)))
    assert tensor_plan.copies == ()
    assert CopyPlan(None, trace.loaded.tensor_plans).computed == 0
    copy_by_plan(tensor_plan, random((4,)), memory.of, OPS)
    assert not memory.storages["p"].materialised


def test_a_tensor_plan_learnt_from_a_weight_with_gaps_is_not_trusted() -> None:
    tensor_plan, _ = learn(Memory(p=torch.empty(4)), copy_all, every_second(random((4,))))
    assert tensor_plan.copies is None


def test_only_the_same_shape_and_dtype_fit() -> None:
    tensor_plan, _ = learn(Memory(p=torch.empty(4)), copy_all, random((4,)))
    assert tensor_plan.fits(torch.empty(4))
    assert not tensor_plan.fits(torch.empty(2, 2))
    assert not tensor_plan.fits(torch.empty(5))
    assert not tensor_plan.fits(torch.empty(4, dtype=torch.bfloat16))


def test_a_weight_is_noted_with_its_parameters_and_the_region_with_them() -> None:
    def loader(views: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        views["p"][1:3].copy_(weight)

    memory = Memory(p=torch.empty(4, 3))
    _, trace = learn(memory, loader, random((2, 3)))
    assert trace.loaded.written == {"weight": ("p",)}
    (storage,) = trace.storages.values()
    assert list(storage.coverage.boxes) == [((1, 3), (0, 3))]
