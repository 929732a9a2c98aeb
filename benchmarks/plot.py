"""Markdown and a plot from the JSON of a benchmark: `python benchmarks/plot.py output/main.json ...`.

With `--output FOLDER` several runs of one table, with different models, become one table there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import document

COLOURS = {"ours": "#2a6f97", "vllm": "#c1121f", "floor": "#6c757d", "restart": "#adb5bd"}
LABELS = {"ours": "this package", "vllm": "vLLM's own", "floor": "floor", "restart": "engine restart"}
UNITS = {"tensors": ("tensors", 1), "bytes": ("GB", 1e9)}


def write(report: dict[str, Any], output: Path) -> None:
    """Write NAME.md and NAME.png for a report."""
    (output / f"{report['table']}.md").write_text(document.whole(report))
    draw(report, output / f"{report['table']}.png")


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot a table: points with extremes, lines along an axis, or one reload after the other."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display
    from matplotlib import pyplot as plt

    ways = list(document.ways_of(report))
    in_rows = not report["axis"] and report["table"] != "repeated"
    height = max(4.0, 0.7 * len(ways) + 2) if in_rows else 4.5
    figure, axes = plt.subplots(figsize=(10, height), layout="constrained")
    if report["axis"]:
        _draw_lines(axes, report, ways)
    elif report["table"] == "repeated":
        _draw_sequence(axes, ways)
    else:
        _draw_points(axes, ways)
    axes.set_title(report["title"])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_points(axes: Any, ways: list[Any]) -> None:
    """Points with extremes: later reloads filled, first ones open, with restart and floor."""
    for row, (model, _, way) in enumerate(ways):
        for place, (name, found) in enumerate(_figures(model, way).items()):
            if found is None:
                continue
            side, _, when = name.partition(", ")
            wrong = side == "vllm" and way["vllm"]["verdict"] != "right"
            axes.errorbar(
                found["median"],
                row + 0.12 * (place - 2.5),
                xerr=[[found["median"] - found["min"]], [found["max"] - found["median"]]],
                fmt="X" if wrong else "o",
                mfc="none" if when == "first" else None,
                color=COLOURS[side],
                label=name.replace(side, LABELS[side]) if row == 0 else None,
            )
    axes.set_yticks(range(len(ways)), [document.what_of(model, name) for model, name, _ in ways])
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds, median and extremes; crosses: the answers were wrong")


def _figures(model: dict[str, Any], way: dict[str, Any]) -> dict[str, Any]:
    """Label -> spread, of one way."""
    sides = {f"{side}, {when}": way[side][when] for side in ("ours", "vllm") for when in ("first", "later")}
    return sides | {"floor": model["summary"]["floor"], "restart": model["summary"]["restart"]}


def _draw_lines(axes: Any, report: dict[str, Any], ways: list[Any]) -> None:
    """Seconds over the number of tensors or bytes."""
    label, unit = UNITS[report["axis"]]
    for side in ("ours", "vllm"):
        for when, style in (("first", "--"), ("later", "-")):
            points = [
                (model[report["axis"]] / unit, way[side][when]) for model, _, way in ways if way[side][when]
            ]
            if not points:
                continue
            x, middles = [x for x, _ in points], [one["median"] for _, one in points]
            axes.plot(x, middles, style, marker="o", color=COLOURS[side], label=f"{LABELS[side]}, {when}")
            axes.fill_between(
                x,
                [o["min"] for _, o in points],
                [o["max"] for _, o in points],
                color=COLOURS[side],
                alpha=0.15,
            )
    floors = [(model[report["axis"]] / unit, model["summary"]["floor"]["median"]) for model, _, _ in ways]
    axes.plot(*zip(*floors, strict=True), ":", marker=".", color=COLOURS["floor"], label="floor")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("seconds")


def _draw_sequence(axes: Any, ways: list[Any]) -> None:
    """Seconds of each reload of each process, in order."""
    for model, name, _ in ways:
        for side, runs in model["runs"][name].items():
            for number, run in enumerate(runs):
                times = [one["seconds"] for one in run["reloads"]]
                label = LABELS[side] if number == 0 else None
                axes.plot(range(1, len(times) + 1), times, marker="o", color=COLOURS[side], label=label)
        axes.axhline(model["summary"]["floor"]["median"], ls=":", color=COLOURS["floor"], label="floor")
    axes.set_xlabel("reload")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)


def together(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge runs of one table. Each model keeps the machine it ran on; its name says another allocator."""
    models = {}
    for report in reports:
        malloc = report["machine"]["malloc"]
        other = "" if malloc == reports[0]["machine"]["malloc"] else f", {malloc}"
        machine = {"machine": report["machine"]}
        models |= {name + other: machine | model for name, model in report["models"].items()}
    return reports[0] | {"models": models}


def main() -> None:
    """Write Markdown and plots from JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON that reload.py or gpu.py has written")
    parser.add_argument("--output", type=Path, help="put all the runs of a table together in this folder")
    arguments = parser.parse_args()
    reports = [json.loads(file.read_text()) for file in arguments.files]
    if arguments.output is None:
        for file, report in zip(arguments.files, reports, strict=True):
            write(report, file.parent)
            print(f"written: {file.with_suffix('.md')} and {file.with_suffix('.png')}")
        return
    for table in dict.fromkeys(report["table"] for report in reports):
        whole = together([report for report in reports if report["table"] == table])
        (arguments.output / f"{table}.json").write_text(json.dumps(whole, indent=1))
        write(whole, arguments.output)
        print(f"written: {table}.json, .md and .png in {arguments.output}")


if __name__ == "__main__":
    main()
