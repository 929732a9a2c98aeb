"""A drafter's quantized copy of its target's head follows the target, by whatever road its weights come.

``draft_lm_head_quantization`` of vLLM 0.33, whose V2 runner does not start here: its own code on models
without an engine, with the kernels' operations played as in the other tests of this folder.
"""

from collections.abc import Iterator

import pytest

from reload_plugin import vllm_api
from tests.engine.gpu_methods import check, copied_heads
from tests.engine.gpu_methods.process import Worker

pytestmark = pytest.mark.skipif(
    vllm_api.minor_of(vllm_api.version()) < (0, 33), reason="this vLLM has no draft_lm_head_quantization"
)
QUANTIZATIONS = ("fp8", "nvfp4")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(check.start_with_plugin)
    yield made
    made.close()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("road", copied_heads.ROADS)
def test_the_copy_is_that_of_a_start_on_the_new_weights(worker: Worker, quantization: str, road: str) -> None:
    assert worker(copied_heads.by_road, quantization, road).result() == []


def test_an_aborted_update_of_the_drafter_puts_its_copy_back(worker: Worker) -> None:
    """While one is open vLLM shows the drafter the target's own head."""
    assert worker(copied_heads.aborted_updates_of_the_drafter, "fp8").result() == []
