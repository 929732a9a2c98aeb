"""The tables of `reload.py` on a CUDA machine, with CUDA graphs captured before and replayed after.

The same commands and options. Engines are compiled and capture their graphs when they start; a run fails when
a reload had them captured again, or when there were none. The floor's copy goes onto the device, everything
waits for the device before a clock is read, and memory on the device stands beside that of the process.
Without a CUDA device it says so and exits with status 2.
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
    """The tables with engines that capture CUDA graphs, and FP8 where a CPU has something like it."""
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
    """Measure, if there is something to measure on."""
    if not machine.has_cuda():
        print(
            "no CUDA device: nothing was measured. benchmarks/reload.py measures on a CPU.", file=sys.stderr
        )
        raise SystemExit(2)
    main(with_graphs(), __file__, "seconds of a reload on a CUDA machine")


if __name__ == "__main__":
    if not engine.as_child(work):
        run()
