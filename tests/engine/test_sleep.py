"""Sleep and wake-up of a running engine, in the order in which RL frameworks call them.

A CPU cannot sleep: the engine's worker takes vLLM's own sleep of the worker on a GPU, over memory that is
spoilt while it is away.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from reload_plugin import EngineBrokenError, status
from reload_plugin.vllm_hooks import workers
from tests import roads

Push = Callable[[roads.Lab, roads.Weights], None]

WORKER = "tests.sleeping_cpu.SleepingCpuWorker"


@pytest.fixture(scope="module", params=["llama_tied", "mixtral"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[roads.Lab]:
    with roads.lab(request.param, tmp_path_factory.mktemp("checkpoints"), worker_cls=WORKER) as one:
        yield one


def trl(lab: roads.Lab, weights: roads.Weights) -> None:
    """It reloads what the engine started with first, as a way around garbage after level 2."""
    lab.llm.collective_rpc("reload_weights")
    roads.tensor_by_tensor(lab, weights)


PUSHES: dict[str, Push] = {
    "TRL": trl,
    "verl": roads.buckets_then_processing,
    "OpenRLHF": roads.one_rpc_a_tensor,
    "SkyRL": roads.chunks_and_nameless_loads,
    "several calls": roads.several_rpcs,
}


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("framework", PUSHES)
def test_a_step_of_a_framework_gives_the_engine_of_a_cold_start(
    lab: roads.Lab, framework: str, level: int
) -> None:
    for letter in "BA":
        lab.llm.sleep(level=level)
        assert status(lab.llm)[0].state == "asleep"
        lab.llm.wake_up(tags=["weights"])
        PUSHES[framework](lab, lab.weights[letter])
        lab.llm.wake_up(tags=["kv_cache"])
        assert lab.difference(letter) == ""
        assert status(lab.llm)[0].state == "serving"


@pytest.mark.parametrize("letter", ["B", "A"])
def test_an_engine_that_lost_its_weights_refuses_requests_until_a_reload(lab: roads.Lab, letter: str) -> None:
    lab.llm.sleep(level=2)
    lab.llm.wake_up()
    assert status(lab.llm)[0].state == "lost"
    for _ in range(2):  # and leaves nothing half begun
        with pytest.raises(EngineBrokenError, match=r"discarded.*Reload a complete checkpoint"):
            lab.serve()
    with pytest.raises(EngineBrokenError, match=r"discarded.*Reload a complete checkpoint"):
        lab.rpc(lambda worker: workers.guarding(lambda *_: None)(worker))  # a forward pass
    roads.whole(lab, lab.weights[letter])
    assert lab.difference(letter) == ""


def test_weights_that_sleep_come_back_by_themselves(lab: roads.Lab) -> None:
    lab.llm.sleep(level=1)
    lab.llm.wake_up()
    assert lab.difference("A") == ""


def test_level_2_spoils_what_the_engine_serves(lab: roads.Lab) -> None:
    """Else the tests above would show nothing."""
    before = [tensor.clone() for tensor in lab.model.parameters() if tensor.numel()]
    lab.llm.sleep(level=2)
    lab.llm.wake_up()
    after = [tensor for tensor in lab.model.parameters() if tensor.numel()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    roads.whole(lab, lab.weights["A"])
