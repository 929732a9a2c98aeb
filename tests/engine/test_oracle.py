"""Warm equals cold, for every case of the zoo; and the proof that the oracle sees it when it does not."""

import functools
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.oracle import Result
from tests.processor import packs_bf16, packs_with_amx, skip_unstartable, skip_without
from tests.zoo import CASES, DIES, MOVED, RIGHT, Case, case_named

# Enough of vLLM's own failures to show that each kind of difference is seen; `--table` runs them all.
OWN_FAILURES = ("llama_tied", "mixtral", "mamba2", "w8a8_dynamic")
PACKED = ("llama_tied", "mamba2")
"""Those that go wrong because bf16 weights of linear layers are packed."""
PROCESSES = 2
VOTE_TIMEOUT = 800.0


class Runs:
    """Results by (case, plugin on), each a future that one of a few processes fills in the background."""

    def __init__(self, wanted: list[tuple[str, bool]], root: Path) -> None:
        self.futures: dict[tuple[str, bool], Future[Result]] = {key: Future() for key in wanted}
        self.batches: queue.SimpleQueue[list[tuple[str, bool]]] = queue.SimpleQueue()
        for plugin in (True, False):
            keys = [key for key in wanted if key[1] is plugin]
            for first in range(PROCESSES if plugin else 1):
                self.batches.put(keys[first :: PROCESSES if plugin else 1])
        for _ in range(PROCESSES):
            threading.Thread(target=self.work, args=(root,), daemon=True).start()

    def work(self, root: Path) -> None:
        """Run batches until none is left."""
        while True:
            try:
                batch = self.batches.get_nowait()
            except queue.Empty:
                return
            if batch:
                self.run_batch(batch, root)

    def run_batch(self, batch: list[tuple[str, bool]], root: Path) -> None:
        """Fill the futures of a batch; an error of the machinery itself goes to all that are still open."""
        plugin = batch[0][1]
        try:
            for result in oracle.run_in_subprocesses([name for name, _ in batch], root / str(plugin), plugin):
                self.futures[result.case, plugin].set_result(result)
        except Exception as error:  # noqa: BLE001  raised again in the test that waits
            for key in batch:
                if not self.futures[key].done():
                    self.futures[key].set_exception(error)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The engines of exactly those tests of this file that were selected, started all at once."""
    items = [item for item in request.session.items if item.path == request.node.path]
    parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
    warm = [(found["case"].name, True) for found in parameters if isinstance(found.get("case"), Case)]
    own = [(found["own_failure"], False) for found in parameters if "own_failure" in found]
    return Runs(warm + own, tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_warm_equals_cold(runs: Runs, case: Case) -> None:
    """Reloaded through A, B, A, B it is the engine of a cold start on B, and nothing has moved."""
    skip_without(case.needs)
    skip_unstartable(case)
    result = runs.futures[case.name, True].result(VOTE_TIMEOUT)
    assert result.verdict == RIGHT, result.summary(limit=40)
    assert result.tensors > 0
    assert result.reload_from.startswith("reload_plugin"), "the plugin was not in use"


@pytest.mark.parametrize("own_failure", OWN_FAILURES)
def test_the_oracle_sees_what_vllm_gets_wrong(runs: Runs, own_failure: str) -> None:
    """With the plugin switched off the same oracle reports the difference that the zoo says there is."""
    if own_failure in PACKED and not packs_bf16():
        pytest.skip("nothing of it is packed on this processor, so vLLM's own reload gets it right")
    result = runs.futures[own_failure, False].result(VOTE_TIMEOUT)
    expected = case_named(own_failure).own
    if own_failure == "w8a8_dynamic" and packs_with_amx():
        expected = MOVED  # its INT8 kernels for AMX pack anew
    assert result.verdict == expected, result.summary()
    assert result.reload_from.startswith("vllm.")


def test_names_are_unique() -> None:
    """Checkpoint folders and results go by the name of the case."""
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "mamba2", "gpt_oss", "w8a8_static", "awq"])
def test_two_seeds_share_no_value(tmp_path: Path, name: str) -> None:
    """Every tensor that can differ between A and B does, so that none can stay behind unseen."""
    folders = oracle.write(case_named(name), tmp_path)
    a, b = (oracle.read_tensors(folders[letter]) for letter in "AB")
    assert a.keys() == b.keys()
    equal = [key for key in a if torch.equal(a[key], b[key])]
    assert not [key for key in equal if not key.endswith(("g_idx", "weight_shape", "qzeros"))]


class Holder:
    """A helper object with a slot, as some kernels are."""

    __slots__ = ("scale",)

    def __init__(self, scale: torch.Tensor) -> None:
        self.scale = scale


Holder.__module__ = "tests.engine.test_oracle"


def hiding_places(tensor: torch.Tensor) -> Iterator[tuple[str, object]]:
    """Attributes of a module that all hide the same tensor."""
    yield "plain", tensor
    yield "listed", [1, {"key": tensor}]
    yield "captured", lambda x: x @ tensor
    yield "partial", functools.partial(torch.add, other=tensor)
    yield "helper", Holder(tensor)
    yield "loose", Holder(torch.nn.ParameterList([tensor]))


@pytest.mark.parametrize(
    ("name", "value"), list(hiding_places(torch.eye(3))), ids=lambda value: str(value)[:8]
)
def test_no_tensor_can_hide(name: str, value: object) -> None:
    """A tensor is found wherever a layer may keep one."""
    layer = torch.nn.Module()
    object.__setattr__(layer, name, value)
    digests = {found.digest for path, found in oracle.live_tensors(torch.nn.Sequential(layer)).items()}
    assert oracle.digest(torch.eye(3)) in digests


def test_digest_sees_dtype_shape_strides_and_bits() -> None:
    """Equal numbers in another form are another tensor."""
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    others = [base.double(), base.reshape(3, 2), base.t().contiguous().t(), base + 1e-7, base.to("meta")]
    assert len({oracle.digest(tensor) for tensor in [base, *others]}) == 6
    assert oracle.digest(base) == oracle.digest(base.clone())


def test_places_are_compared_by_object_and_by_address() -> None:
    """A copy is another object; new storage under the old object is another address."""
    model = torch.nn.Linear(2, 2)
    before = oracle.Snapshot([0.0], oracle.live_tensors(model))
    model.bias = torch.nn.Parameter(model.bias.detach().clone())
    model.weight.data = model.weight.data.clone()
    after = oracle.Snapshot([0.0], oracle.live_tensors(model))
    found = {(difference.kind, difference.path) for difference in oracle.compare_places("x", before, after)}
    assert found == {("object", "model.bias"), ("address", "model.weight")}
    assert not oracle.compare_values("x", before, after)


CRASHING = """
import json, os, sys
for name in [word for word in sys.argv if len(word) == 1]:
    if name == "b":
        os.abort()
    print(json.dumps({"case": name, "differences": []}), flush=True)
"""


def test_a_process_that_dies_costs_only_its_case(tmp_path: Path) -> None:
    """The case that killed the process is reported as crashed, and the ones after it still run."""
    command = (sys.executable, "-c", CRASHING)
    results = list(oracle.run_in_subprocesses(["a", "b", "c"], tmp_path, command=command))
    assert [(result.case, result.verdict) for result in results] == [("a", RIGHT), ("b", DIES), ("c", RIGHT)]
