"""What the process keeps of headers and read batches, used by two threads at once."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reload_plugin.checkpoint import open_source
from reload_plugin.checkpoint.io.read_batches import ReadBatch
from reload_plugin.plan.source import DirectRead, Region, TensorInfo

TENSORS = {f"layers.{number}.weight": torch.full((64,), float(number)) for number in range(40)}
ORDER = tuple(TENSORS)
NBYTES = 64 * 4


class Memory:
    """Destinations of an engine of its own: every tensor in one parameter, in the order that it wants."""

    def __init__(self, order: tuple[str, ...]) -> None:
        self.key = object()
        self.order = order
        self.storage = torch.full((64 * len(order),), -1.0).untyped_storage()

    def __call__(self, info: TensorInfo) -> torch.Tensor | None:
        return None

    def targets(self, infos: list[TensorInfo]) -> list[list[Region]]:
        places = [self.order.index(info.name) * NBYTES for info in infos]
        return [[Region(f"parameter of {id(self)}", 0, place, NBYTES)] for place in places]

    def needed(self, info: TensorInfo) -> None:
        return None

    def note_read(self, nbytes: int) -> None:
        pass

    def memory(self, parameter: str) -> torch.UntypedStorage:
        assert parameter == f"parameter of {id(self)}", "the parameter of another engine"
        return self.storage

    def wrong(self) -> list[str]:
        found = torch.empty(0).set_(self.storage, 0, (len(self.order), 64))
        return [name for row, name in zip(found, self.order, strict=True) if not row.equal(TENSORS[name])]


@pytest.fixture
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*actions: Callable[[], None]) -> list[BaseException]:
    """What actions raised that ran at the same time, each on a thread of its own."""
    raised: list[BaseException] = []
    together = threading.Barrier(len(actions))

    def run(action: Callable[[], None]) -> None:
        together.wait()
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            raised.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_two_engines_read_one_checkpoint_at_the_same_time_each_to_its_own_memory(
    tmp_path: Path, eager_switches: None
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)

    def reading(order: tuple[str, ...]) -> Callable[[], None]:
        def read() -> None:
            for _ in range(150):
                memory = Memory(order)
                got = list(open_source(file).read(ORDER, None, memory))
                assert all(isinstance(item, DirectRead) for item in got)
                assert memory.wrong() == []

        return read

    assert at_once(*(reading(order) for order in (ORDER, ORDER[::-1], sorted(ORDER)))) == []


class Switching(ReadBatch):
    """A batch at which another thread gets the processor whenever something was stored in it."""

    other: Memory | None = None

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        other, vars(self)["other"] = vars(self).get("other"), None
        if other is not None:
            thread = threading.Thread(target=self.direct_read_plan, args=(other,))
            thread.start()
            thread.join()


def test_a_batch_that_two_engines_share_plans_for_each_of_them(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    places = open_source(tmp_path / "model.safetensors").locations
    batch = Switching(places, NBYTES * len(places))
    mine, others = Memory(ORDER), Memory(ORDER[::-1])
    vars(batch)["other"] = others
    for memory in (mine, others, mine):
        assert [*batch.direct_read_plan(memory).direct_read.parameters] == [f"parameter of {id(memory)}"]


def test_headers_are_remembered_by_several_threads_at_once(tmp_path: Path, eager_switches: None) -> None:
    """More headers than are kept, so that every thread also drops those of the others."""
    files = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for number, file in enumerate(files):
        save_file({f"{number}.weight": torch.ones(number + 1)}, file)

    def opening(step: int) -> Callable[[], None]:
        def run() -> None:
            for turn in range(400):
                number = turn * step % len(files)
                (info,) = open_source(files[number]).infos()
                assert (info.name, info.shape) == (f"{number}.weight", (number + 1,))

        return run

    assert at_once(*map(opening, (1, 5, 7))) == []
