"""vLLM up to 0.28: a worker process takes up calls inside of its loop."""

from __future__ import annotations

from ... import vllm_api
from .. import executors
from ..patches import replace_method_of_all
from .until_0_31 import HooksUntil031


class HooksUntil028(HooksUntil031):
    """Places in vLLM 0.28."""

    def patch_worker_process(self) -> None:
        """The loop, which asks a queue for the next call."""
        replace_method_of_all(
            *vllm_api.WORKER_PROCESS, "worker_busy_loop", executors.counting_calls_of_a_loop
        )
