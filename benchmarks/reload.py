"""Seconds and memory of a reload: this package, vLLM's own, a restart of the engine, and the floor.

Measures the tables that are named, `main` by default: see `tables.py`. Each side has processes of its own;
they take turns, so that a slow minute of the machine affects all of them. After each timed reload the answers
of the engine are compared with those of a cold start on the same weights. Wrong answers of this package fail
the run; wrong answers of vLLM's own reload are recorded.

Writes NAME.json (after each model), NAME.md and NAME.png; `plot.py` makes the last two from the first.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import document
import plot
from machine import machine
from models import Model
from tables import TABLES, Table, Way, measure
from trials import Processes, engine, work

OUTPUT = Path(__file__).parent / "output"


def run(table: Table, processes: Processes, output: Path, folder: Path | None, profile: bool) -> None:
    """Measure one table; write its JSON after each model."""
    report: dict[str, Any] = {"table": table.name, "title": table.title, "axis": table.axis}
    report |= {"machine": machine(), "rounds": table.rounds, "reloads": table.reloads, "models": {}}
    output.mkdir(parents=True, exist_ok=True)
    for model in table.models:
        if model.missing:
            print(f"{model.name} is left out: vLLM has no {model.missing} for this processor", flush=True)
            continue
        with tempfile.TemporaryDirectory(dir=folder) as root:
            report["models"][model.name] = measure(table, model, processes, Path(root), profile)
        (output / f"{table.name}.json").write_text(json.dumps(report, indent=1))
    plot.write(report, output)
    print(document.whole(report) + document.profiles(report))
    print(f"written: {output / table.name}.json, .md and .png")


def main(
    tables: Mapping[str, Table] = TABLES, script: str = __file__, description: str = "seconds of a reload"
) -> None:
    """Read the command line and measure the tables that it names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(tables)}, or all")
    parser.add_argument("--models", nargs="+", help="only these of each table, by name")
    parser.add_argument("--ways", nargs="+", help="only these ways of reloading, by name")
    parser.add_argument("--rounds", type=int, help="processes for each side, if not the table's own number")
    parser.add_argument("--reloads", type=int, help="reloads in each process, 2 or more")
    parser.add_argument("--profile", action="store_true", help="also the top functions of a later reload")
    parser.add_argument("--smoke", action="store_true", help="tiny models, one process a side: does it work?")
    parser.add_argument("--folder", type=Path, help="where to write checkpoints; up to three of the largest")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    names = list(tables) if arguments.tables == ["all"] else arguments.tables or ["main"]
    if unknown := [name for name in names if name not in tables]:
        parser.error(f"no such table: {', '.join(unknown)}; there are {', '.join(tables)}")
    if (arguments.reloads or 2) < 2 or (arguments.rounds or 1) < 1:
        parser.error("at least one round of two reloads")
    chosen = [narrowed(tables[name], arguments) for name in names]
    if empty := [table.name for table in chosen if not table.models]:
        parser.error(f"no model of that name in {', '.join(empty)}")
    with Processes(script, together=arguments.smoke) as processes:
        for table in chosen:
            run(table, processes, arguments.output, arguments.folder, arguments.profile)


def narrowed(table: Table, arguments: argparse.Namespace) -> Table:
    """The table with the models, ways, rounds and reloads of the command line."""
    kept = tuple(
        model for model in table.models if arguments.models is None or model.name in arguments.models
    )
    ways = arguments.ways
    ways_of = table.ways_of if ways is None else only(table.ways_of, ways)
    rounds, reloads = arguments.rounds, arguments.reloads
    if arguments.smoke:
        kept = tuple(model.small() for model in kept)
        rounds, reloads = rounds or 1, reloads or 2
    rounds, reloads = rounds or table.rounds, reloads or table.reloads
    return replace(table, models=kept, ways_of=ways_of, rounds=rounds, reloads=reloads)


def only(ways_of: Callable[[Model], tuple[Way, ...]], names: list[str]) -> Callable[[Model], tuple[Way, ...]]:
    """The ways that have one of these names; all ways, if none has."""

    def chosen(model: Model) -> tuple[Way, ...]:
        ways = ways_of(model)
        return tuple(way for way in ways if way.name in names) or ways

    return chosen


if __name__ == "__main__":
    if not engine.as_child(work):
        main()
