"""Runs the scenarios of `two_ranks` and `failing_ranks`, on vLLM's executors.

All of them share one engine a model, in a process of their own: the ranks are forked from it, which is much
faster than starting two interpreters. Ray starts its own.

    python -m tests.rank_scenarios FOLDER [--executor ray|beside] [--model tied] [SCENARIO ...]
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests import failing_ranks, ray_cluster, two_ranks
from tests.two_ranks import CASES, MUTE, Engine

EVERYWHERE = (
    two_ranks.live_push,
    two_ranks.warm_equals_cold,
    two_ranks.each_rank_plans,
    two_ranks.source_raises,
    two_ranks.names_are_missing,
    two_ranks.all_offenders_are_named_on_every_rank,
    two_ranks.processing_raises,
    two_ranks.layerwise,
    two_ranks.any_rank_raises,
    two_ranks.partial_update,
)
ONCE = (
    two_ranks.live_push_fails_on_one_rank,
    two_ranks.the_tail_raises,
    two_ranks.memory_runs_out,
    two_ranks.an_export_is_written_by_both,
    two_ranks.a_slow_rank_is_waited_for,
    two_ranks.a_rank_is_too_slow,
    *failing_ranks.SURVIVED,
    two_ranks.answers_stay_in_step_after_a_failure,
    two_ranks.a_call_that_cannot_be_sent_is_not_answered,
    two_ranks.layer_by_layer_policies_are_refused,
    two_ranks.block,
    two_ranks.a_commit_that_fails_stops_that_rank,
)


PROCESSES = {
    "tied": (*EVERYWHERE, *ONCE, failing_ranks.a_rank_is_killed),
    "experts": EVERYWHERE,
    "stages": (
        two_ranks.live_push,
        two_ranks.warm_equals_cold,
        two_ranks.each_rank_plans,
        two_ranks.source_raises,
        two_ranks.names_are_missing,
        two_ranks.processing_raises,
        two_ranks.the_tail_raises,
        two_ranks.layerwise,
        two_ranks.any_rank_raises,
        two_ranks.partial_update,
        two_ranks.live_push_fails_on_one_rank,
        failing_ranks.a_rank_fails_before_its_reload,
        failing_ranks.its_last_chunk_fails,
        failing_ranks.all_causes_are_told_by_rank,
    ),
    "shared_out": (
        two_ranks.live_push,
        two_ranks.warm_equals_cold,
        two_ranks.each_rank_plans,
        two_ranks.layerwise,
        two_ranks.any_rank_raises,
        two_ranks.names_are_missing,
        two_ranks.partial_update,
    ),
}
BESIDE = {
    "grid": (
        two_ranks.live_push,
        two_ranks.warm_equals_cold,
        two_ranks.any_rank_raises,
        two_ranks.partial_update,
    ),
}
"""Run by `--executor beside`, on the executor of processes: four ranks, which in the suite take too long."""


RAY = {
    "tied": (
        two_ranks.warm_equals_cold,
        two_ranks.layerwise,
        two_ranks.live_push,
        two_ranks.source_raises,
        *failing_ranks.SURVIVED,
        two_ranks.live_push_fails_on_one_rank,
        failing_ranks.a_rank_is_killed,
    ),
}
SCENARIOS = {"mp": PROCESSES, "ray": RAY, "beside": BESIDE}
"""Executor -> model -> what is done with it, in this order."""


def run(kind: str, root: Path, names: list[str], executor: str) -> None:
    """One JSON line for each scenario, with the traceback if it failed."""
    chosen = [s for s in SCENARIOS[executor][kind] if not names or s.__name__ in names]
    if not chosen:
        return
    backend = "ray" if executor == "ray" else "mp"
    with two_ranks.engine_of(CASES[kind], root, kind not in MUTE, backend) as engine:
        for scenario in chosen:
            print(json.dumps([kind, scenario.__name__, *outcome(engine, scenario)]), flush=True)


def outcome(engine: Engine, scenario: Callable[[Engine], None]) -> tuple[float, str]:
    """Seconds, and the traceback if it failed."""
    started, error = time.monotonic(), ""
    try:
        engine.reload("A")
        scenario(engine)
    except Exception:  # noqa: BLE001 - one scenario must not end the others
        error = traceback.format_exc()
    return round(time.monotonic() - started, 1), error


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--executor", choices=SCENARIOS, default="mp")
    parser.add_argument("--model", action="append", help="one of two_ranks.CASES; default: all")
    parser.add_argument("scenarios", nargs="*")
    asked = parser.parse_intermixed_args()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    if asked.executor == "ray":
        ray_cluster.offer_platform(asked.folder / "platform")
    for kind in asked.model or SCENARIOS[asked.executor]:
        run(kind, asked.folder, asked.scenarios, asked.executor)


if __name__ == "__main__":
    main()
