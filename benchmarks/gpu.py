"""The tables of `reload.py` on a machine with a GPU, and one of what only a GPU meets.

Commands and options are those of `reload.py`, and `card`: on a full card (the memory that vLLM's defaults and
the KV cache leave, less all but 8 % of the weights' bytes), from the device, on two streams, after sleep.
Engines capture CUDA graphs at their start, one for the whole model, and replay them later. A run fails when
an engine captured no graphs, or captured graphs again in a reload. The floor's copy goes to the device, the
device is synchronized before a clock is read, and memory on the device is reported beside that of the
process. Without a GPU the exit status is 2.

Not run yet: no GPU was at hand.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace

import machine
from models import DENSE, EXPERTS, LARGE, Model
from reload import main
from tables import ONLINE, TABLES, Table, Way
from trials import engine, work

GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_mode": "FULL"},
    "gpu_memory_utilization": 0.92,
}
"""One graph for the whole model; and the KV cache has what vLLM gives it by default."""
FP8 = {"quantization": "fp8"}
"""vLLM's own online quantization: the checkpoint is bf16, the kernels read FP8."""
SLEEPS = {"enable_sleep_mode": True}
SPARE = 0.08

OURS = ("ours",)
FULL_CARD = (
    Way("folder", spare=SPARE),
    Way("iterator", comes="ordered", spare=SPARE),
    Way("iterator on the device", comes="device", spare=SPARE),
    Way("chunks on two streams", comes="streams", spare=SPARE, sides=OURS),
    Way("live push", comes="pushed", spare=SPARE, sides=OURS),
    Way("iterator on the device, memory free", comes="device"),
)
AFTER_SLEEP = (
    Way("folder, after sleep 1", asleep=1),
    Way("folder, after sleep 2", asleep=2),
    Way("iterator on the device, after sleep 2", comes="device", asleep=2, sides=OURS),
)


def _on_a_card(model: Model) -> tuple[Way, ...]:
    return AFTER_SLEEP if model.options.get("enable_sleep_mode") else FULL_CARD


CARD = Table(
    "card",
    "A full card, two streams, sleep",
    (
        Model("dense, 4 GB", LARGE),
        Model("8 layers × 128 experts", EXPERTS),
        Model("dense, 4 GB, FP8 online", LARGE, options=FP8),
        Model("dense, sleep mode", DENSE, options=SLEEPS),
    ),
    _on_a_card,
    rounds=3,
)


def with_graphs(tables: Mapping[str, Table] = TABLES) -> dict[str, Table]:
    """The tables with engines that capture CUDA graphs, and with online FP8 in place of online INT8."""
    return {
        name: replace(table, models=_on_device(table.models), graphs=True)
        for name, table in (dict(tables) | {CARD.name: CARD}).items()
    }


def _on_device(models: tuple[Model, ...]) -> tuple[Model, ...]:
    kept = [model for model in models if model.options != ONLINE]
    if len(kept) < len(models):
        kept += [
            Model("dense, FP8 online", DENSE, options=FP8),
            Model("8 layers × 128 experts, FP8 online", EXPERTS, options=FP8),
        ]
    return tuple(replace(model, options=GRAPHS | dict(model.options)) for model in kept)


def run() -> None:
    """Measure, if there is a GPU."""
    if not machine.has_accelerator():
        print("no GPU: nothing was measured. benchmarks/reload.py measures on a CPU.", file=sys.stderr)
        raise SystemExit(2)
    main(with_graphs(), __file__, "seconds of a reload on a machine with a GPU")


if __name__ == "__main__":
    if not engine.as_child(work):
        run()
