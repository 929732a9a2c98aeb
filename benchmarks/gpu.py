"""The tables of `reload.py` on a CUDA machine, with CUDA graphs captured at the start and replayed later.

Commands and options are those of `reload.py`. A run fails when an engine captured no graphs, or captured
graphs again in a reload. The floor's copy goes to the device, the device is synchronized before a clock is
read, and memory on the device is reported beside that of the process. Without a CUDA device the exit status
is 2.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace

import machine
from models import DENSE, EXPERTS, Model
from reload import main
from tables import ONLINE, TABLES, Table
from trials import engine, work

GRAPHS = {"enforce_eager": False, "kv_cache_memory_bytes": 1 << 30}
FP8 = {"quantization": "fp8"}
"""vLLM's own online quantization: the checkpoint is bf16, the kernels read FP8."""


def with_graphs(tables: Mapping[str, Table] = TABLES) -> dict[str, Table]:
    """The tables with engines that capture CUDA graphs, and with online FP8 in place of online INT8."""
    return {
        name: replace(table, models=_on_device(table.models), graphs=True) for name, table in tables.items()
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
    """Measure, if there is a CUDA device."""
    if not machine.has_cuda():
        print(
            "no CUDA device: nothing was measured. benchmarks/reload.py measures on a CPU.", file=sys.stderr
        )
        raise SystemExit(2)
    main(with_graphs(), __file__, "seconds of a reload on a CUDA machine")


if __name__ == "__main__":
    if not engine.as_child(work):
        run()
