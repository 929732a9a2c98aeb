"""Markdown and a plot from the JSON of a benchmark: `python benchmarks/plot.py output/main.json ...`."""

import argparse
import json
from pathlib import Path
from typing import Any

import markdown

COLOURS = {"ours": "#2a6f97", "vllm": "#c1121f", "floor": "#6c757d", "restart": "#adb5bd"}
LABELS = {"ours": "this package", "vllm": "vLLM's own", "floor": "floor", "restart": "engine restart"}
UNITS = {"tensors": ("tensors", 1), "bytes": ("GB", 1e9)}


def write(report: dict[str, Any], output: Path) -> None:
    """NAME.md and NAME.png beside NAME.json."""
    (output / f"{report['table']}.md").write_text(markdown.document(report))
    draw(report, output / f"{report['table']}.png")


def draw(report: dict[str, Any], path: Path) -> None:
    """One picture of a table: bars, lines along an axis, or one point a reload."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display
    from matplotlib import pyplot as plt

    ways = list(markdown.ways_of(report))
    height = max(4.0, 0.9 * len(ways) + 1.5) if _is_bars(report) else 4.5
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    if report["axis"]:
        _draw_lines(axes, report, ways)
    elif report["table"] == "repeated":
        _draw_sequence(axes, ways)
    else:
        _draw_bars(axes, ways)
    axes.set_title(report["title"])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_bars(report: dict[str, Any]) -> bool:
    return not report["axis"] and report["table"] != "repeated"


def _draw_bars(axes: Any, ways: list[Any]) -> None:
    """Later reloads as bars with their extremes; first reloads as open marks; restarts beside them."""
    for row, (model, _, way) in enumerate(ways):
        for place, (name, found) in enumerate(_later(model, way).items()):
            if found is None:
                continue
            y = row + 0.2 * (place - 1.5)
            wrong = name == "vllm" and way["vllm"]["verdict"] != "right"
            low, high = found["median"] - found["min"], found["max"] - found["median"]
            axes.barh(
                y,
                found["median"],
                0.18,
                color=COLOURS[name],
                xerr=[[low], [high]],
                hatch="///" if wrong else None,
                ecolor="#333333",
                edgecolor="white",
                label=LABELS[name] if row == 0 else None,
            )
            first = way.get(name, {}).get("first")
            if first is not None:
                label = "first reload" if row == 0 and name == "ours" else None
                axes.plot(first["median"], y, "o", mfc="none", color=COLOURS[name], label=label)
    axes.set_yticks(range(len(ways)), [markdown.what_of(model, name) for model, name, _ in ways])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds, median and extremes (hatched: the answers were wrong)")


def _later(model: dict[str, Any], way: dict[str, Any]) -> dict[str, Any]:
    found = model["summary"]
    sides = {side: way[side]["later"] for side in ("ours", "vllm")}
    return sides | {"floor": found["floor"], "restart": found["restart"]}


def _draw_lines(axes: Any, report: dict[str, Any], ways: list[Any]) -> None:
    """Seconds over what the models differ in."""
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
    """Each reload of each process, one after the other."""
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


def main() -> None:
    """Make Markdown and plots again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON that reload.py or gpu.py has written")
    for file in parser.parse_args().files:
        write(json.loads(file.read_text()), file.parent)
        print(f"written: {file.with_suffix('.md')} and {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
