"""Which weight-transfer engines get our reload, and which write into the served weights by themselves.

One table for vLLM's backends and for those of frameworks. An engine that is not in it is taken for ours if it
derives from one that is, else for one that calls ``initialize_layerwise_reload`` or ``model.load_weights``
and nothing more internal than that.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

TRANSFER = "vllm.distributed.weight_transfer."
PATCHES = "vllm.model_executor.model_loader.checkpoint_weight_patch"


@dataclass(frozen=True)
class Backend:
    """How one backend is treated."""

    name: str
    module: str
    """Prefix of the module that it is in."""
    treatment: str
    """``ours``, or ``hands off``: vLLM's own functions run for it, and then nobody knows what is served."""
    why: str
    function: str = ""
    """The one function of the module that is meant; empty for all of it."""
    whole: bool = True
    """Whether it writes all weights, so that a model whose weights were lost serves again."""


OURS, HANDS_OFF = "ours", "hands off"
LAYERWISE = "drives vLLM's layerwise internals"
BY_ITSELF = "prepares and processes by itself"
SKYRL_RDT = "skyrl.backends.skyrl_train.weight_sync.sharded_rdt"
NAN = "loads NaN where a value stays, under a patched copy_"

BACKENDS = (
    Backend("nccl", TRANSFER + "nccl_engine", OURS, "starts, loads and finalizes"),
    Backend("ipc", TRANSFER + "ipc_engine", OURS, "starts, loads and finalizes"),
    Backend("files", "reload_plugin.vllm_hooks.transfer_engine", OURS, "our own"),
    Backend("sparse_nccl", TRANSFER + "sparse_nccl_engine", HANDS_OFF, "writes values in place", whole=False),
    Backend("sparse patches", PATCHES, HANDS_OFF, NAN, "_load_nan_masked_weights", False),
    Backend("nccl_m2n", TRANSFER + "m2n_engine", HANDS_OFF, "receives into served memory"),
    Backend("sharded_rdt", TRANSFER + "sharded_rdt_engine", HANDS_OFF, LAYERWISE),
    Backend("modelexpress", TRANSFER + "modelexpress_engine", HANDS_OFF, LAYERWISE),
    Backend("ModelExpress", "modelexpress", HANDS_OFF, LAYERWISE),
    Backend("prime-rl NIXL", "prime_rl.inference.vllm.worker.nixl", HANDS_OFF, "writes into served memory"),
    Backend("SkyRL sharded_rdt", SKYRL_RDT, HANDS_OFF, LAYERWISE),
    Backend("verl FP8", "verl.utils.vllm.vllm_quant_utils", HANDS_OFF, BY_ITSELF),
    Backend("verl FP8", "verl.utils.vllm.vllm_fp8_utils", HANDS_OFF, BY_ITSELF),
    Backend("verl QAT", "verl.utils.qat", HANDS_OFF, BY_ITSELF),
    Backend("verl ModelOpt", "verl.utils.modelopt", HANDS_OFF, BY_ITSELF),
)

DEPTH = 24
"""Frames that are looked through for a backend's own code."""


def backend_of(module: str, function: str = "") -> Backend | None:
    """The backend that a module belongs to, by its longest prefix; None for code of nobody in the table."""
    found = [
        backend
        for backend in BACKENDS
        if (module == backend.module or module.startswith((backend.module + ".", backend.module + "_")))
        and backend.function in ("", function)
    ]
    return max(found, key=lambda backend: len(backend.module), default=None)


def engine_backend(engine: object) -> Backend | None:
    """The backend of a transfer engine: of its class, or of the nearest one that it derives from."""
    for cls in type(engine).__mro__:
        if (backend := backend_of(cls.__module__)) is not None:
            return backend
    return None


def foreign_caller() -> Backend | None:
    """The backend with ``hands off`` whose code the caller's caller was called from, if there is one."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(DEPTH):
        if frame is None:
            return None
        module = frame.f_globals.get("__name__", "")
        if module not in _cleared:
            backend = backend_of(module, frame.f_code.co_name)
            if backend is None and not any(one.module == module for one in BACKENDS):
                _cleared.add(module)
            elif backend is not None and backend.treatment == HANDS_OFF:
                return backend
        frame = frame.f_back
    return None


_cleared: set[str] = set()
"""Modules that were looked up and belong to no backend: a push may be of many thousand calls."""
