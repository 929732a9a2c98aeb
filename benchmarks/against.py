"""Seconds and memory of reloads of other checkouts of this repository against this one, in paired processes.

    python benchmarks/against.py FOLDER ... [--models dense ...] [--rounds 5] [--reloads 6]

A FOLDER is another checkout, such as a `git worktree` of an earlier commit, or of this one with something
left out. All sides reload the same checkpoints in fresh processes that take turns; their answers have to be
equal. Ratios are of medians, the other checkout's to this one's: above 1, this one is faster. Writes
against.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from models import Model
from tables import MAIN, TABLES, WHOLE, write_all
from tqdm import tqdm
from trials import engine

THIS = "this"
HERE = Path(__file__).resolve().parent.parent
OUTPUT = Path(__file__).parent / "output"
WORK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from trials import work
answer = work("reloads", **json.load(open(sys.argv[2])))
json.dump(answer, open(sys.argv[3], "w"))
"""


def with_entry_point(checkout: Path, folder: Path) -> str:
    """A search path with which vLLM finds the plugin of a checkout, wherever that has its entry point."""
    group = "vllm.general_plugins"
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    points = "\n".join(f"{name} = {value}" for name, value in project["entry-points"][group].items())
    described = folder / "reload_plugin_of_a_checkout-0.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    (described / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: reload-plugin-of-a-checkout\nVersion: 0\n"
    )
    (described / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
    return os.pathsep.join((str(checkout), str(folder)))


def measured(checkout: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The reloads of one fresh process.

    Raises:
        SystemExit: the process failed.

    """
    asked, answer = folder / "job.json", folder / "answer.json"
    asked.write_text(json.dumps(job))
    path = with_entry_point(checkout, folder / checkout.name)
    variables = os.environ | engine.environ(plugin=True) | {"PYTHONPATH": path}
    command = [sys.executable, "-c", WORK, str(checkout / "benchmarks"), str(asked), str(answer)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr[-2000:]}")
    run: dict[str, Any] = json.loads(answer.read_text())
    if run["error"] is not None or not all(one["stages"] for one in run["reloads"]):
        raise SystemExit(f"{checkout}: {run['error'] or 'the plugin was not loaded'}")
    return run


def compare(model: Model, others: list[Path], rounds: int, reloads: int) -> dict[str, Any]:
    """All sides on one model: name of the side -> samples and medians."""
    sides = {THIS: HERE} | {other.name: other for other in others}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as root:
        folders = write_all(model, (WHOLE,), Path(root))
        steps = WHOLE.steps(folders, reloads, "ours")
        job = {"folders": folders, "options": dict(model.options), "steps": steps}
        for number in tqdm(range(rounds), desc=model.name, unit="round", file=sys.stderr):
            for side in sorted(sides, reverse=bool(number % 2)):
                runs[side].append(measured(sides[side], job, Path(root)))
    answers = {
        json.dumps(one["answer"]) for found in runs.values() for run in found for one in run["reloads"][::2]
    }
    if len(answers) != 1:
        raise SystemExit(f"{model.name}: the sides answer differently")
    return {side: figures(found) for side, found in runs.items()}


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = [run["reloads"][0]["seconds"] for run in runs]
    later = [one["seconds"] for run in runs for one in run["reloads"][1:]]
    extra = max(one["extra"] for run in runs for one in run["reloads"])
    return {
        "first": {"median": statistics.median(first), "samples": first},
        "later": {"median": statistics.median(later), "samples": later},
        "peak_extra_bytes": extra,
    }


def row(model: str, other: str, found: dict[str, Any]) -> str:
    """One row of the table: the other checkout's medians and peak, and their ratios to this one's."""
    cells = [model, other]
    for kind in ("first", "later"):
        theirs, ours = found[other][kind]["median"], found[THIS][kind]["median"]
        cells.append(f"{theirs:.3f} / {ours:.3f} s = {theirs / ours:.2f}")
    theirs, ours = (found[side]["peak_extra_bytes"] / 2**20 for side in (other, THIS))
    cells.append(f"{theirs:.0f} / {ours:.0f} MiB")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Read the command line, measure, print the table."""
    names = [model.name for model in MAIN]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("others", type=Path, nargs="+", metavar="FOLDER", help="another checkout")
    parser.add_argument("--models", nargs="+", default=names[:4], help=f"of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=TABLES["main"].rounds, help="processes of each side")
    parser.add_argument("--reloads", type=int, default=TABLES["main"].reloads, help="reloads in a process")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args()
    report = {}
    asked.output.mkdir(parents=True, exist_ok=True)
    print("| model | other | first reload | later reloads | peak extra memory |\n|---|---|---|---|---|")
    for model in (model for model in MAIN if model.name in asked.models):
        others = [other.resolve() for other in asked.others]
        found = report[model.name] = compare(model, others, asked.rounds, asked.reloads)
        (asked.output / "against.json").write_text(json.dumps(report, indent=1))
        for other in others:
            print(row(model.name, other.name, found), flush=True)


if __name__ == "__main__":
    main()
