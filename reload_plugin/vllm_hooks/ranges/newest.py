"""vLLM from 0.32 on."""

from __future__ import annotations

from ... import vllm_api
from .. import executors, runners
from ..patches import replace_function, replace_method, replace_method_of_all


class Hooks:
    """Places in vLLM that differ between versions."""

    def patch_reload(self) -> None:
        """The function that reloads, as far as there is one beside the runners' methods."""
        replace_function(vllm_api.INPLACE, "reload_weights", runners.reloading)

    def patch_runners(self) -> None:
        """The runners' ``reload_weights``. Called when vLLM has imported the runner that it uses."""
        for module, cls in vllm_api.RUNNERS:
            replace_method(module, cls, "reload_weights", runners.passing_options)

    def patch_worker_process(self) -> None:
        """The place where a worker process takes up a call."""
        replace_method_of_all(*vllm_api.WORKER_PROCESS, "_execute_worker_rpc", executors.counting_calls)
