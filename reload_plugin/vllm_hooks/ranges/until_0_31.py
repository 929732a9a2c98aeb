"""vLLM up to 0.31: the V1 runner's method is what reloads, and the V2 runner's calls it."""

from __future__ import annotations

from ... import vllm_api
from .. import runners
from ..patches import replace_method
from .newest import Hooks


class HooksUntil031(Hooks):
    """Places in vLLM 0.29 to 0.31."""

    def patch_reload(self) -> None:
        """There is no such function."""

    def patch_runners(self) -> None:
        """The V1 runner's method only: the V2 runner's passes on whatever it gets, our options too."""
        v1 = vllm_api.RUNNERS[0]
        vllm_api.get(*v1)  # the V2 runner imports it when it reloads
        replace_method(*v1, "reload_weights", runners.reloading_itself)
