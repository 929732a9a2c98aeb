"""``doctor``: by which road the frameworks beside vLLM push weights, and what the plugin does with that."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass

from ..vllm_hooks.live import LIVE_SWITCH
from .finding import Finding

PUSHES = "model.load_weights on the served model"
TRANSFER = "vLLM's weight transfer (start, update, finish)"
BLOCK = "initialize_layerwise_reload to finalize_layerwise_reload"
OURS = "one update, all or nothing"
ALONE = "left alone: it writes into the served weights by itself, which the status then says"


@dataclass(frozen=True)
class Framework:
    """A framework, as it is installed, and the roads that its weights take."""

    name: str
    distributions: tuple[str, ...]
    roads: tuple[tuple[str, str], ...]
    """(road, what the plugin does)."""


FRAMEWORKS = (
    Framework("TRL", ("trl",), ((f"colocated: {PUSHES}", OURS), (f"server: {TRANSFER}", OURS))),
    Framework("verl", ("verl",), ((f"BF16: {PUSHES}, then processing", OURS), ("FP8, QAT", ALONE))),
    Framework("OpenRLHF", ("openrlhf",), ((f"{PUSHES}, a call a tensor", OURS),)),
    Framework("ms-swift", ("ms-swift",), ((f"{PUSHES}, then processing", OURS),)),
    Framework("checkpoint-engine", ("checkpoint-engine",), ((f"{PUSHES}, by buckets", OURS),)),
    Framework("Unsloth", ("unsloth", "unsloth_zoo"), ((f"weights not shared: {PUSHES}", OURS),)),
    Framework(
        "NeMo-RL", ("nemo-rl", "nemo_rl"), ((f"{PUSHES}, then processing", OURS), ("reload_weights", OURS))
    ),
    Framework("prime-rl", ("prime-rl",), ((BLOCK, OURS), ("NIXL", ALONE))),
    Framework("SkyRL", ("skyrl", "skyrl-train"), ((TRANSFER, OURS), ("delta", OURS), ("sharded_rdt", ALONE))),
    Framework("ModelExpress", ("modelexpress",), (("its own backend", ALONE),)),
    Framework("AReaL", ("areal",), ((PUSHES, OURS),)),
    Framework("PipelineRL", ("pipeline-rl", "pipelinerl"), ((PUSHES, OURS),)),
    Framework("Ray", ("ray",), ()),
    Framework("Dynamo", ("ai-dynamo",), ()),
    Framework("vLLM-Omni", ("vllm-omni",), ()),
)


def roads() -> Iterator[Finding]:
    """The roads of vLLM itself, and those of every framework that is installed."""
    if os.environ.get(LIVE_SWITCH) == "0":
        pushes = f"{LIVE_SWITCH}=0: {PUSHES} stays vLLM's own, and the status calls such weights unknown"
        yield Finding("live pushes", "note", pushes)
    else:
        yield Finding("live pushes", "ok", f"{PUSHES}: {OURS}")
    for framework in FRAMEWORKS:
        if (version := _installed(framework)) is None:
            continue
        found = "; ".join(f"{road}: {what}" for road, what in framework.roads)
        yield Finding(framework.name, "note", f"{version}: {found or 'serves with vLLM; nothing differs'}")


def _installed(framework: Framework) -> str | None:
    for name in framework.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
