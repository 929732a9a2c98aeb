"""The roads of `tests.roads` on engines of two ranks: all ranks are pushed to, and each is compared.

export VLLM_WORKER_MULTIPROC_METHOD=fork TORCHDYNAMO_DISABLE=1
python -m tests.ranked_roads llama mixtral  # run models here and print what differs
python -m tests.ranked_roads --table        # all of them, as a Markdown table
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import oracle, roads, two_ranks  # before torch: it sets the environment that engines read

import cloudpickle  # isort: skip
import torch  # isort: skip

from reload_plugin import ReloadError
from tests.checkpoints import read_tensors
from tests.zoo import case_named


class RankedLab:
    """What a road needs of an engine whose model lives in the processes of its ranks."""

    def __init__(self, engine: two_ranks.Engine) -> None:
        self.engine, self.llm = engine, engine.llm
        self.weights = {
            letter: list(read_tensors(Path(folder)).items()) for letter, folder in engine.folders.items()
        }

    def __reduce__(self) -> tuple[object, ...]:
        return OnThisRank, ()

    @property
    def model(self) -> Model:
        return Model(self)

    def rpc(self, call: Callable[[object], object]) -> object:
        """A call of every worker."""
        try:
            return self.llm.collective_rpc(on_rank, args=(cloudpickle.dumps(call),))[0]
        except Exception as error:
            if "serves what it served before" in str(error):
                raise ReloadError(str(error)) from error  # vLLM's executor passes texts on
            raise

    def difference(self, letter: str) -> str:
        try:
            self.engine.assert_is(letter)
        except AssertionError as error:
            return str(error)
        return ""

    def assert_answers(self, letter: str) -> None:
        wanted = self.engine.states[letter][0]
        assert oracle.differing_answers(oracle.answer(self.llm), wanted) == []

    def serve(self) -> None:
        oracle.answer(self.llm)

    def process(self) -> None:
        self.rpc(process)


class Model:
    """The model on every rank."""

    def __init__(self, lab: RankedLab) -> None:
        self._lab = lab

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The same weights to each rank; an iterator that raises does so on each."""
        pairs, error = [], None
        try:
            pairs.extend(weights)
        except OSError as raised:
            error = raised
        self._lab.rpc(functools.partial(load, pairs=pairs, error=error))


# --- on a rank ---

worker_here: list[object] = []
"""The worker of this process."""


class OnThisRank:
    """What is left of a lab that was sent to a rank."""

    def process(self) -> None:
        process(worker_here[0])


def on_rank(worker: object, pickled: bytes) -> object:
    worker_here[:] = [worker]
    return cloudpickle.loads(pickled)(worker)


def load(worker: object, pairs: roads.Weights, error: Exception | None) -> None:
    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield from pairs
        if error is not None:
            raise error

    worker.get_model().load_weights(weights())


def process(worker: object) -> None:
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    process_weights_after_loading(worker.get_model(), worker.model_config, torch.device("cpu"))


# --- running them ---


@contextmanager
def lab(name: str, root: Path) -> Iterator[RankedLab]:
    """The lab of one model of the zoo on two ranks."""
    with two_ranks.engine_of(case_named(name), root) as engine:
        yield RankedLab(engine)


if __name__ == "__main__":
    # Pickles name the module of a function, and a rank has no such `__main__`.
    from tests import ranked_roads

    roads.main(of=ranked_roads.lab)
