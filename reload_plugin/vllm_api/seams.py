"""Every symbol of vLLM that this package leans on, with the versions that have it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .symbols import (
    ATTENTION,
    ATTENTION_BASE,
    CLIENTS,
    CONFIGS,
    COPIED_HEADS,
    DUMMY,
    EXECUTOR,
    EXPERT_BALANCER,
    GROUP_COORDINATOR,
    INPLACE,
    LAYERWISE,
    LOADER_UTILS,
    MODEL_UTILS,
    MTP,
    QUANTIZATION,
    REPLICAS,
    REPOSITORIES,
    RUN_METHOD,
    RUNAI,
    RUNAI_LOADER,
    RUNNERS,
    TORCH_UTILS,
    WEIGHT_UTILS,
    WORKER,
    WORKER_PROCESS,
)
from .versions import Minor, minor_of, version


@dataclass(frozen=True)
class Seam:
    """A symbol, as a module and a name in it; the name of a method has its class before it.

    ``since`` is the first minor version that has it, ``until`` the last one where it is leaned on.
    """

    module: str
    name: str
    since: Minor = (0, 0)
    until: Minor | None = None
    imported_by_vllm: bool = False
    """Whether it is in a module that only a worker imports, and that is not imported to look for it."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def belongs_to(self, minor: Minor) -> bool:
        """Whether that version should have it."""
        return self.since <= minor and (self.until is None or minor <= self.until)

    def is_there(self) -> bool:
        """Whether the installed vLLM has it."""
        if self.imported_by_vllm and self.module not in sys.modules:
            return self.name in _defined_in(self.module)
        try:
            found: object = importlib.import_module(self.module)
        except ImportError:
            return False
        for part in self.name.split("."):
            # What a class inherits does not count: its base has another body than what is leaned on.
            there = part in vars(found) if isinstance(found, type) else hasattr(found, part)
            if not there:
                return False
            found = getattr(found, part)
        return True


def _of_workers(place: tuple[str, str], *methods: str, since: Minor = (0, 0)) -> tuple[Seam, ...]:
    module, cls = place
    return tuple(Seam(module, f"{cls}.{name}", since, imported_by_vllm=True) for name in methods)


_SCALES = "QuantizationConfig.get_cache_scale_mapper"
_METADATA = "QuantizationConfig.get_checkpoint_weight_mapper"
_COPIED_HEADS = ("_SOURCES", "refresh_quantized_lm_heads", "restore_quantized_lm_heads")

SEAMS: tuple[Seam, ...] = (
    Seam(LOADER_UTILS, "initialize_model"),
    Seam(LOADER_UTILS, "process_weights_after_loading"),
    Seam(LAYERWISE, "initialize_layerwise_reload"),
    Seam(LAYERWISE, "finalize_layerwise_reload"),
    Seam(LAYERWISE, "finalize_layerwise_processing"),
    Seam(INPLACE, "reload_weights", since=(0, 32)),
    Seam(ATTENTION, "is_deferred_attention_layer", since=(0, 28)),
    Seam(ATTENTION_BASE, "AttentionLayerBase", until=(0, 27)),
    Seam(ATTENTION, "MMEncoderAttention", until=(0, 27)),
    Seam(ATTENTION, "MLAAttention", until=(0, 26)),
    Seam(ATTENTION, "Attention", until=(0, 26)),
    Seam(WEIGHT_UTILS, "default_weight_loader"),
    Seam(TORCH_UTILS, "set_default_torch_dtype"),
    Seam("vllm.config", "set_current_vllm_config"),
    Seam("vllm.config", "get_current_vllm_config_or_none"),
    Seam("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader"),
    Seam(DUMMY, "DummyModelLoader"),
    Seam(MODEL_UTILS, "AutoWeightsLoader"),
    Seam(MODEL_UTILS, "WeightsMapper._map_name", until=(0, 30)),
    Seam(MODEL_UTILS, "WeightsMapper.map_name", since=(0, 31)),
    Seam(MTP, "disable_mtp_completeness_check", since=(0, 27)),
    Seam(QUANTIZATION, _SCALES),
    Seam(QUANTIZATION, _METADATA, since=(0, 30)),
    Seam(*EXECUTOR),
    Seam(EXECUTOR[0], f"{EXECUTOR[1]}.collective_rpc"),
    Seam(*WORKER_PROCESS),
    Seam(WORKER_PROCESS[0], f"{WORKER_PROCESS[1]}.worker_busy_loop", until=(0, 28)),
    Seam(WORKER_PROCESS[0], f"{WORKER_PROCESS[1]}._execute_worker_rpc", since=(0, 29)),
    Seam(WORKER_PROCESS[0], f"{WORKER_PROCESS[1]}.handle_output"),
    Seam(*RUN_METHOD),
    Seam(*REPLICAS),
    Seam(CLIENTS, "AsyncMPClient.collective_rpc_async"),
    Seam(CLIENTS, "AsyncMPClient._call_utility_async"),
    Seam(CONFIGS, "_CONFIG_REGISTRY"),
    Seam(CONFIGS, "patch_rope_parameters"),
    Seam(REPOSITORIES, "try_get_local_file"),
    Seam(RUNAI, "is_runai_obj_uri"),
    Seam(RUNAI_LOADER, "RunaiModelStreamerLoader"),
    Seam(*GROUP_COORDINATOR),
    *(Seam(COPIED_HEADS, name, since=(0, 33), imported_by_vllm=True) for name in _COPIED_HEADS),
    *_of_workers(EXPERT_BALANCER, "add_model"),
    *(seam for runner in RUNNERS for seam in _of_workers(runner, "reload_weights", "get_model")),
    *_of_workers(WORKER, "execute_model", "update_weights", "finish_weight_update", "sleep", "wake_up"),
    *_of_workers(WORKER, "get_draft_model", since=(0, 26)),
    *_of_workers(WORKER, "discard", since=(0, 31)),
    *_of_workers(WORKER, "reset_weights", since=(0, 32)),
)
"""Every symbol leaned on, in any version."""


def seams_of(minor: Minor) -> list[Seam]:
    """The seams that a minor version should have. A newer one than all known should have the newest's."""
    return [seam for seam in SEAMS if seam.belongs_to(minor)]


def missing_seams() -> list[str]:
    """Seams that the installed vLLM should have by its version, and has not, as ``module.name``."""
    minor = minor_of(version())
    return [] if minor is None else [str(seam) for seam in seams_of(minor) if not seam.is_there()]


@functools.cache
def _defined_in(module: str) -> frozenset[str]:
    """What a module's source defines, without importing it: functions, variables, classes, and methods
    (``Class.method``).
    """
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return frozenset()
    if spec is None or spec.origin is None:
        return frozenset()
    found: set[str] = set()
    cls = ""
    for line in Path(spec.origin).read_text(encoding="utf-8").splitlines():
        if start := re.match(r"class (\w+)", line):
            cls = start[1]
            found.add(cls)
        elif method := re.match(r"    (?:async )?def (\w+)", line):
            found.add(f"{cls}.{method[1]}")
        elif other := re.match(r"(?:async )?def (\w+)|(\w+)(?:: [^=]+)? = ", line):
            found.add(other[1] or other[2])
    return frozenset(found)
