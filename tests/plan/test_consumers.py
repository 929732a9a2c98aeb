"""Consumers of accesses, each by itself and fed by hand: no dispatch mode, no model."""

import weakref
from collections.abc import Callable

import pytest
import torch

from reload_plugin.errors import LateReadError, LateWriteError
from reload_plugin.plan import provenance as provenance_module
from reload_plugin.plan.access import Access, Kind, operand
from reload_plugin.plan.arrivals import Loaded
from reload_plugin.plan.contention import SlotContention
from reload_plugin.plan.copy_plan import StridedCopy, TensorPlan
from reload_plugin.plan.fit import left_over, misfit
from reload_plugin.plan.materialisation import Materialisation
from reload_plugin.plan.plan_recorder import PlanRecorder
from reload_plugin.plan.provenance import Provenance, Values
from reload_plugin.plan.served_guard import ServedGuard
from reload_plugin.plan.slot_log import SlotLog
from reload_plugin.record.model_record import TensorRecord
from reload_plugin.record.staged_storage import StagedStorage
from reload_plugin.record.tensor_layout import Constant, Geometry, TensorFormat
from reload_plugin.tensors import storage_id

CPU = torch.device("cpu")


def placeholder(
    name: str = "p",
    shape: tuple[int, ...] = (4,),
    is_parameter: bool = True,
    dtype: torch.dtype = torch.float32,
) -> StagedStorage:
    """Staging of one tensor, with no memory so far."""
    like = torch.empty(shape, dtype=dtype)
    fmt = TensorFormat(name, Geometry.of(like), dtype, CPU, torch.Tensor, False, {}, Constant(3.0))
    return StagedStorage([TensorRecord(fmt, 0, weakref.ref(like), is_parameter, "layer")], CPU)


def staged(
    name: str = "p", shape: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32
) -> StagedStorage:
    """Staging of one parameter, allocated: a test that fails prints its tensors."""
    storage = placeholder(name, shape, dtype=dtype)
    storage.materialise()
    return storage


def view_of(storage: StagedStorage) -> torch.Tensor:
    return next(iter(storage.views.values()))


def copy(target: torch.Tensor, source: torch.Tensor) -> Access:
    at = operand(source)
    return Access(Kind.COPY, (at,), (operand(target),), at, 0, target)


def read(*tensors: torch.Tensor) -> Access:
    return Access(Kind.OTHER, tuple(map(operand, tensors)))


def write(*tensors: torch.Tensor) -> Access:
    return Access(Kind.OTHER, (), tuple(map(operand, tensors)))


# --- materialisation ---


@pytest.mark.parametrize("dry", [False, True])
def test_staging_gets_memory_and_in_a_dry_run_loses_it_again(dry: bool) -> None:
    memory, storage = Materialisation(dry), placeholder()
    memory.allocate(storage)
    assert storage.storage.nbytes() == 16
    if not dry:
        assert view_of(storage).tolist() == [3.0] * 4
    memory.give_back()
    assert storage.materialised is not dry


def test_small_tables_have_values_in_a_dry_run_and_keep_them() -> None:
    memory, table = Materialisation(dry=True), placeholder(is_parameter=False)
    memory.allocate(table)
    memory.give_back()
    assert view_of(table).tolist() == [3.0] * 4


# --- guard ---


@pytest.fixture
def guard() -> ServedGuard:
    return ServedGuard({}, Loaded())


def test_served_memory_is_not_written_and_may_be_read(guard: ServedGuard) -> None:
    served, mine = torch.zeros(4), torch.zeros(4)
    guard.protect(lambda: [("layer.weight", served)])
    guard.check(write(mine), "w")
    guard.check(read(served[1:]), "w")
    with pytest.raises(LateWriteError, match=r"While 'w' was loaded, .* wrote to layer\.weight"):
        guard.check(write(served[1:]), "w")
    guard.forget()
    guard.check(write(served), "w")


def test_what_is_served_is_asked_for_once_and_only_if_somebody_writes() -> None:
    asked: list[int] = []
    guard = ServedGuard({}, Loaded())
    guard.protect(lambda: asked.append(1) or [])
    guard.check(read(torch.zeros(1)), "w")
    assert asked == []
    for _ in range(2):
        guard.check(write(torch.zeros(1)), "w")
    assert asked == [1]


def test_a_complete_layer_is_not_read_and_its_group_is_noted() -> None:
    loaded = Loaded()
    guard, parameter = ServedGuard({}, loaded), torch.zeros(4)
    guard.note_complete(parameter, "layer.weight", "layer.packed")
    with pytest.raises(LateReadError, match=r"looked at layer\.weight, which is complete"):
        guard.check(read(parameter), "w")
    assert loaded.read_back == {"layer.packed"}


def test_staging_of_a_processed_group_is_not_written() -> None:
    storage = staged()
    guard = ServedGuard({storage.key: storage}, Loaded())
    guard.check(write(view_of(storage)), "w")
    storage.closed = True
    with pytest.raises(LateWriteError, match="wrote to p,"):
        guard.check(write(view_of(storage)), "w")
    with pytest.raises(LateWriteError, match="wrote to p,"):
        guard.check_open(storage, "w")


def test_a_storage_that_gets_the_identity_of_a_freed_one_is_not_taken_for_it() -> None:
    """A commit may move a served parameter to new memory: its old storage is freed while others are made."""
    for protect in (True, False):
        guard, gone = ServedGuard({}, Loaded()), torch.zeros(4)
        identity = storage_id(gone)
        if protect:
            guard.protect(lambda gone=gone: [("layer.weight", gone)])
            guard.check(write(torch.zeros(1)), "w")
            guard._find_protected = tuple
        else:
            guard.note_complete(gone, "layer.weight", "layer.weight")
        del gone
        others = [torch.empty(4) for _ in range(1000)]
        for other in others:
            guard.check(write(other) if protect else read(other), "w")
        assert identity not in map(storage_id, others)


# --- provenance ---


def test_values_are_followed_through_what_is_computed() -> None:
    provenance, one, two = Provenance({}, Loaded()), torch.ones(4), torch.ones(4)
    provenance.begin("one", one, late=True)
    provenance.begin("two", two, late=True)
    total = one + two
    values = provenance.read(read(one, two))
    assert values == Values(("one", "two"))
    provenance.follow(total, values)
    assert provenance.weights_in(total[1:]) == ("one", "two")
    own = torch.empty(4)
    provenance.note_write_elsewhere(operand(own), provenance.read(copy(own, total)))
    assert provenance.weights_in(own) == ("one", "two")
    assert provenance.weights_in(torch.empty(4)) == ()


def test_a_parameter_has_the_values_of_the_weight_that_was_written_there() -> None:
    storage, loaded = staged(), Loaded()
    provenance, weight = Provenance({storage.key: storage}, loaded), torch.ones(4)
    provenance.begin("one", weight)
    provenance.note_write("p", "one", Values(("one",)))
    loaded.note_written("one", "p")
    assert provenance.read(read(view_of(storage))) == Values(("one",)), "its own weight is there: no return"
    assert loaded.read_back == set()
    provenance.end()
    provenance.begin("two", torch.ones(4))
    values = provenance.read(read(view_of(storage)))
    assert values == Values(("one",), revisits=True)
    assert loaded.read_back == {"p"}
    provenance.note_write("q", "two", values)
    assert loaded.read_back == {"p", "q"}
    provenance.note_write("p", "two", Values(("two",)))
    assert provenance.read(read(view_of(storage))).weights == ("",), "several were written there"


def test_staging_that_gets_the_memory_of_other_staging_does_not_get_its_weights() -> None:
    """A pool gives the block of a layer that is done to the next: the same storage, another parameter."""
    storage, storages = staged("p"), {}
    storages[storage.key] = storage
    provenance = Provenance(storages, Loaded())
    provenance.begin("one", torch.ones(4))
    provenance.note_write("p", "one", Values(("one",)))
    other = staged("q")
    storages[storage.key] = other
    assert provenance.read(read(view_of(storage))).weights == ("",)


def test_freed_memory_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance_module, "_MANY", 3)
    provenance = Provenance({}, Loaded())
    for number in range(100):
        provenance.begin(f"w{number}", torch.empty(4), late=True)
        assert len(provenance._held) < 12


# --- slots ---


def test_written_elements_are_noted_with_their_weights() -> None:
    storage, loaded = staged(shape=(4, 3)), Loaded()
    log, view = SlotLog(loaded), view_of(storage)
    assert not log.note(operand(view[:2]), storage, ("w",), "w")
    assert log.note(operand(view[:2]), storage, ("",), "v")
    assert loaded.written == {"w": ("p",), "v": ("p",)}
    assert list(storage.coverage.boxes) == [((0, 2), (0, 3))]
    assert log.take_recent() == {storage.key}
    assert log.take_recent() == set()


def test_a_view_with_another_dtype_covers_the_same_bytes() -> None:
    storage = staged(shape=(8,), dtype=torch.uint8)
    SlotLog(Loaded()).note(operand(view_of(storage)[4:].view(torch.int32)), storage, ("w",), "w")
    assert list(storage.coverage.boxes) == [((4, 8),)]


# --- copy plan ---


def learnt(
    write_it: Callable[[PlanRecorder, torch.Tensor, torch.Tensor], object],
) -> tuple[TensorPlan, Loaded]:
    loaded = Loaded()
    recorder, weight, target = PlanRecorder(loaded), torch.ones(2, 3), torch.empty(4, 3)
    recorder.begin("w", weight, (2, 3))
    write_it(recorder, weight, target)
    name, tensor_plan = recorder.end()
    assert name == "w"
    assert loaded.tensor_plans == {"w": tensor_plan}
    return tensor_plan, loaded


OF_W = Values(("w",))


def noted(recorder: PlanRecorder, access: Access, values: Values = OF_W) -> StridedCopy | None:
    return recorder.note_write(access, access.writes[0], "p", values)


def test_a_copy_of_a_part_is_learnt_with_both_its_places() -> None:
    tensor_plan, loaded = learnt(lambda recorder, w, p: noted(recorder, copy(p[1:3, 0], w[:, 1])))
    (one,) = tensor_plan.copies
    assert (one.target, one.source) == (Geometry(3, (2,), (3,)), Geometry(1, (2,), (3,)))
    assert loaded.repeatable


def test_a_number_that_was_not_read_from_the_weight_is_learnt() -> None:
    def fill(recorder: PlanRecorder, weight: torch.Tensor, target: torch.Tensor) -> None:
        noted(recorder, Access(Kind.FILL, (), (operand(target),), None, 2.5, target), Values())

    def fill_with_what_was_read(recorder: PlanRecorder, weight: torch.Tensor, target: torch.Tensor) -> None:
        recorder.note_scalar_read()
        fill(recorder, weight, target)

    assert [one.value for one in learnt(fill)[0].copies] == [2.5]
    tensor_plan, loaded = learnt(fill_with_what_was_read)
    assert tensor_plan.copies is None
    assert loaded.computed == {"w": (("p", Geometry.of(torch.empty(4, 3))),)}


def test_a_weight_that_was_changed_before_it_was_copied_is_computed() -> None:
    def change(recorder: PlanRecorder, weight: torch.Tensor, target: torch.Tensor) -> None:
        recorder.note_write_elsewhere(operand(weight))
        noted(recorder, copy(target[:2], weight))

    assert learnt(change)[0].copies is None


def test_what_is_written_of_another_weight_or_after_the_last_cannot_be_repeated() -> None:
    _, loaded = learnt(lambda recorder, w, p: noted(recorder, copy(p[:2], w), Values(("other",))))
    assert not loaded.repeatable
    loaded = Loaded()
    assert noted(PlanRecorder(loaded), copy(torch.empty(4), torch.ones(4)), Values()) is None
    assert not loaded.repeatable


# --- contention ---


def slot(size: tuple[int, ...]) -> StridedCopy:
    where = Geometry.contiguous(size)
    return StridedCopy("p", where, torch.float32, where, torch.float32)


@pytest.mark.parametrize("size", [(), (4,), (2, 3)])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_two_weights_for_one_slot_the_later_of_a_cold_start_stays(
    size: tuple[int, ...], order: str
) -> None:
    loaded = Loaded()
    contention, first_to_last = SlotContention(loaded), []
    for again, name in enumerate(order):
        first_to_last.append(contention.is_overwritten(slot(size), name, bool(again)))
        loaded.tensor_plans[name] = TensorPlan(size, torch.float32, (slot(size),))
    assert first_to_last == [False, order == "ba"]
    assert [list(names) for names in loaded.contested.values()] == [list(order)]


def test_a_weight_that_is_written_twice_does_not_contend_with_itself() -> None:
    loaded = Loaded()
    contention = SlotContention(loaded)
    assert not any(contention.is_overwritten(slot((4,)), "a", again) for again in (False, True))
    assert loaded.contested == {}


# --- fit ---


@pytest.mark.parametrize(
    ("target", "source", "parameter", "fits"),
    [
        (torch.empty(4), torch.empty(4), "weight", True),
        (torch.empty(4), torch.empty(4, dtype=torch.bfloat16), "weight", True),
        (torch.empty(4), torch.empty(1), "weight", False),
        (torch.empty(4), torch.empty(1), "weight_scale", True),
        (torch.empty(4, 4), torch.empty(4), "weight_scale", False),
        (torch.empty(4, dtype=torch.int8), torch.empty(4), "weight", False),
        (torch.empty(4, dtype=torch.uint8), torch.empty(4, dtype=torch.float8_e4m3fn), "weight", True),
        (torch.empty(4), torch.empty(4, dtype=torch.complex64), "weight", False),
    ],
)
def test_fit(target: torch.Tensor, source: torch.Tensor, parameter: str, fits: bool) -> None:
    assert (misfit(target, source, parameter, None) is None) is fits


def test_a_weight_of_which_a_part_is_left_over_is_too_large() -> None:
    assert left_over(TensorPlan((4,), torch.float32, (slot((4,)),))) is None
    assert left_over(TensorPlan((4,), torch.float32, ())) is None
    assert left_over(TensorPlan((4,), torch.float32, None)) is None
    assert left_over(TensorPlan((5,), torch.float32, (slot((4,)),))) == (
        "shape [5], of which p takes 4 elements only"
    )
