"""Processing that enters collectives, on two ranks: together, for the same layer, or not at all."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

RANKS = 2
SECONDS = 20
"""After so many, gloo gives up waiting for another rank: much later than anything here may take."""

RANK = """
import datetime, json, sys, time, types
import torch, torch.distributed as dist
from torch import nn
from vllm.config import VllmConfig
from reload_plugin import vllm_api
from reload_plugin.errors import ReloadError
from reload_plugin.record.recorder import record_constructed
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.reload import reload_weights
from reload_plugin.ranks import votes
from reload_plugin.ranks.votes import begin_call
from reload_plugin.transaction.chunked_update import abort_weight_update, finish_layerwise, open_layerwise
from reload_plugin.vllm_hooks import executors, plugin
from tests.transaction.test_session import CONFIG, CPU, Method, Model, utils, values

rank, file, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=seconds))
plugin.register()

class Reducing(Method):
    fails = False

    def process_weights_after_loading(self, layer):
        if Reducing.fails:
            raise RuntimeError("out of memory")
        amax = layer.weight.data.abs().max()
        dist.all_reduce(amax, op=dist.ReduceOp.MAX)
        layer.scale = nn.Parameter(amax.reshape(1), requires_grad=False)

def weights(step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {name: torch.randn(4, 3, generator=generator) * (5 if name.startswith("first") else 1)
            for name in ("first.weight", "lm_head.weight")}

config = VllmConfig()
config.parallel_config.tensor_parallel_size = config.parallel_config.world_size = 2
config.load_config.load_format = "by the test"
model = Model(Reducing)
record_constructed(model, None, config)
model.load_weights(iter(weights(0).items()))
utils.process_weights_after_loading(model, CONFIG, CPU)

def scales():
    return [float(layer.scale) for layer in (model.first, model.lm_head)]

def reload(step, fails="", backwards=False):
    items = list(weights(step).items())
    if backwards:
        items.reverse()

    def stream():
        yield items[0]
        if fails == "stream":
            raise OSError("the line went dead")
        yield items[1]

    started, before = time.monotonic(), values(model)
    Reducing.fails = fails == "processing"
    try:
        reload_weights(model, stream())
        said = "committed"
    except ReloadError as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        Reducing.fails = False
    return {"said": said, "seconds": time.monotonic() - started, "scales": scales(),
            "same": values(model) == before, "broken": state_of(model).broken}

worker = types.SimpleNamespace(model_runner=types.SimpleNamespace(get_model=lambda: model))
tell = executors.telling_other_ranks(lambda self, output: output)

def call(function, *args):
    # as vLLM's worker process does with a call of its executor
    begin_call()
    try:
        answer = function(*args)
    except Exception as error:
        answer = error
    tell(types.SimpleNamespace(worker=worker), answer)
    if isinstance(answer, Exception):
        raise answer

def update(step, fails="", backwards=False, spread=False):
    # in chunks, each a call
    config.parallel_config.enable_expert_parallel = spread
    items = list(weights(step).items())
    if backwards:
        items.reverse()
    started, before, said, first = time.monotonic(), values(model), "committed", votes.call_number()
    try:
        call(open_layerwise, model)
        for number, item in enumerate(items):
            Reducing.fails = fails == "processing" and number == 0
            call(model.load_weights, iter([item] if fails != "load" or number else [(item[0], item[1][:1])]))
        call(finish_layerwise, model)
    except ReloadError as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        Reducing.fails = False
    if said != "committed":
        call(abort_weight_update, model)
    while votes.call_number() < first + 5:  # every rank gets the same calls
        begin_call()
    return {"said": said, "seconds": time.monotonic() - started, "scales": scales(),
            "same": values(model) == before, "broken": state_of(model).broken}

print(json.dumps(scales()), flush=True)
for line in sys.stdin:
    given = json.loads(line)
    print(json.dumps((update if given.pop("chunks", False) else reload)(**given)), flush=True)
"""


class Ranks:
    """Two processes that hold one model."""

    def __init__(self, folder: Path) -> None:
        root = Path(__file__).resolve().parents[2]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(folder / "store"), str(SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
            )
            for rank in range(RANKS)
        ]
        self.scales = self._answers()

    def _answers(self) -> list:
        return [json.loads(process.stdout.readline()) for process in self.processes]

    def reload(self, step: int, *changes: dict) -> list[dict]:
        """Reload on both, changed on each; what came of it."""
        for process, change in zip(self.processes, changes or ({}, {}), strict=True):
            process.stdin.write(json.dumps({"step": step, **change}) + "\n")
            process.stdin.flush()
        return self._answers()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(20)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


def expected(step: int) -> list[float]:
    """The scales of a cold start: each layer's largest value over both ranks."""
    import torch

    def of(rank: int) -> list[float]:
        generator = torch.Generator().manual_seed(10 * step + rank)
        return [float((torch.randn(4, 3, generator=generator) * by).abs().max()) for by in (5, 1)]

    return [max(pair) for pair in zip(of(0), of(1), strict=True)]


def assert_committed(found: list[dict], step: int) -> None:
    assert [one["said"] for one in found] == ["committed"] * RANKS
    assert [one["scales"] for one in found] == [pytest.approx(expected(step))] * RANKS


@pytest.mark.parametrize("how", [{}, {"chunks": True, "spread": True}])
def test_ranks_whose_weights_come_in_other_orders_process_in_the_order_of_the_model(
    ranks: Ranks, how: dict
) -> None:
    """That processing enters collectives is known from the start. In chunks such ranks have other experts."""
    for step in (1, 2):
        assert_committed(ranks.reload(step, how, how | {"backwards": True}), step)


@pytest.mark.parametrize("chunks", [False, True])
def test_ranks_that_are_well_get_the_scales_of_a_cold_start(ranks: Ranks, chunks: bool) -> None:
    assert ranks.scales == [pytest.approx(expected(0))] * RANKS
    for step in (1, 2):
        assert_committed(ranks.reload(step, {"chunks": chunks}, {"chunks": chunks}), step)


@pytest.mark.parametrize(
    ("chunks", "fails"),
    [(False, "stream"), (False, "processing"), (True, "processing"), (True, "load")],
)
def test_a_rank_that_fails_keeps_the_other_out_of_the_collective(
    ranks: Ranks, chunks: bool, fails: str
) -> None:
    started = time.monotonic()
    found = ranks.reload(1, {"chunks": chunks}, {"chunks": chunks, "fails": fails})
    assert time.monotonic() - started < SECONDS / 2
    assert "RanksDisagreeError" in found[0]["said"]
    assert "rank 1" in found[0]["said"]
    assert all(one["same"] and one["broken"] is None for one in found)
    assert_committed(ranks.reload(2, {"chunks": chunks}, {"chunks": chunks}), 2)
