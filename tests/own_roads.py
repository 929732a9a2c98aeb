"""What vLLM itself does on the roads of `tests.roads`: a fresh engine for each, without this plugin.

RELOAD_PLUGIN=0 python -m tests.own_roads llama mixtral  # some minutes a model; a Markdown table
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import oracle, roads  # before torch: it sets the environment that engines read

import pytest  # isort: skip

from tests.checkpoints import read_tensors  # isort: skip
from tests.zoo import case_named  # isort: skip

NOT_HERE = (roads.asleep_in_between,)
"""They call hooks of this plugin."""


def served(lab: roads.Lab) -> str:
    """Whose engine it is now."""
    for letter in "BA":
        try:
            if not lab.difference(letter):
                return letter
        except Exception as error:  # noqa: BLE001 - an engine that cannot answer is an outcome
            return f"does not answer ({type(error).__name__})"
    return "neither"


def outcome(lab: roads.Lab, road: roads.Road) -> str:
    """What a road from A to B came to."""
    raised = ""
    try:
        road(lab, lab.weights["B"])
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - an outcome
        raised = type(error).__name__
    now = served(lab)
    if road in roads.FAILURES:
        return "old weights" if now == "A" else now
    if now == "B" and not raised:
        return "right"
    now = {"A": "old weights", "B": "new weights"}.get(now, now)
    return f"{raised}, {now}" if raised else f"no error, {now}"


def outcomes(name: str, root: Path) -> Iterator[str]:
    """Of each road on one model."""
    case = case_named(name)
    folders = oracle.write(case, root)
    weights = {letter: list(read_tensors(folders[letter]).items()) for letter in "AB"}
    with oracle.running(case, folders["B"]) as llm:
        cold_b = oracle.snapshot(llm, case)
    for road in (*roads.PUSHES, *roads.FAILURES):
        if road in NOT_HERE:
            yield "-"
            continue
        with oracle.running(case, folders["A"]) as llm:
            cold_a = oracle.snapshot(llm, case)
            yield outcome(roads.Lab(llm, case, weights, {"A": cold_a, "B": cold_b}, cold_a), road)


def main() -> None:
    """Print the table of the models that are named."""
    if os.environ.get("RELOAD_PLUGIN") != "0":
        sys.exit("Set RELOAD_PLUGIN=0: this is about vLLM without the plugin.")
    names = sys.argv[1:] or list(roads.MODELS)
    found = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found.append(list(outcomes(name, Path(folder))))
    print("| road |", " | ".join(names), "|")
    print("|---|" + "---|" * len(names))
    for road, *cells in zip((*roads.PUSHES, *roads.FAILURES), *found, strict=True):
        print(f"| `{road.__name__}` |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
