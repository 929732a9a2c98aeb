"""Every GPU method on the simulated device, by every road: ``python -m tests.sim_device [NAME ...]``.

With ``--graphs`` as if graphs were captured, with ``-v`` with tracebacks.

Each row is started on A and reloaded to B and to A by each road; values have to be those of a cold start,
and every tensor the object at the address it was. Prints a line for each road, and what is wrong.
"""

from __future__ import annotations

import collections
import sys
import time
import traceback

import torch

from tests.engine.gpu_methods import walker
from tests.sim_device.models import NAMES, ROADS, built, cold, expect_cold, expect_unmoved, start


def tried(name: str) -> dict[str, str]:
    """Road -> what was wrong; empty where nothing was. A road that failed leaves the others a new model."""
    found: dict[str, str] = {}
    waiting = list(ROADS)
    for generation in "AB":
        cold(name, generation, None)  # a start within another takes the stand-ins of its packages away
    while waiting:
        with built(name) as model:
            before = walker.take_picture(model.model)
            while waiting:
                road = waiting.pop(0)
                try:
                    for generation in "BA":
                        ROADS[road](model, generation)
                        expect_cold(name, generation, model)
                        expect_unmoved(before, model)
                except Exception as error:  # noqa: BLE001 - whatever it is stands in the table
                    found[road] = f"{type(error).__name__}: {error}"
                    if "-v" in sys.argv:
                        traceback.print_exc()
                    break
                found[road] = ""
    return found


def main(names: list[str]) -> int:
    """Print the table. Returns 1 if anything was wrong."""
    start()
    if "--graphs" in sys.argv:
        from reload_plugin import vllm_api

        vllm_api.captures_graphs = lambda _: True
    wrong: dict[str, list[str]] = collections.defaultdict(list)
    started = time.monotonic()
    for name in names:
        for road, what in tried(name).items():
            if what:
                wrong[road].append(name)
                print(f"{name}, {road}: {what}", flush=True)
        cold.cache_clear()
        torch.accelerator.empty_cache()
    print("| road | right | of |\n|---|---|---|")
    for road in ROADS:
        print(f"| {road} | {len(names) - len(wrong[road])} | {len(names)} |")
    print(f"{time.monotonic() - started:.0f} s")
    return int(any(wrong.values()))


if __name__ == "__main__":
    chosen = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    sys.exit(main(chosen or list(NAMES)))
