"""Write the tables of the documents from the JSON files in `results`: `python benchmarks/readme.py`.

A table stands between two comments, `<!-- benchmark NAME -->` and `<!-- end -->`; the text between them is
replaced. With `--check` nothing is written: the exit status is 1 where a document differs from the results.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from document import WHENS, middle, plainly, seconds, table, times, ways_of
from formats import BEYOND, peak_of
from machine import MIB

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = tuple(
    ROOT / name for name in ("README.md", "benchmarks/README.md", "reload_plugin/checkpoint/README.md")
)
"""The documents that hold tables of measurements."""
PLACE = re.compile(r"(<!-- benchmark (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A document with every table rewritten from the results."""
    return PLACE.sub(lambda f: f"{f[1]}\n{TABLES[f[2]](_report(f[2]))}\n{f[3]}", text)


def _report(name: str) -> dict[str, Any]:
    file = "main" if name in ("summary", "stages", "processors") else name
    report: dict[str, Any] = json.loads((RESULTS / f"{file}.json").read_text())
    return report


SUMMARY = ("dense", "8 layers × 128 experts", "20,000 tensors", "dense, INT8 W8A8")
"""Models of the short table."""


def _summary(report: dict[str, Any]) -> str:
    """Four models of the main table, reloaded from a folder under ``auto``."""
    rows = []
    for model, way, found in ways_of(report):
        if way or model["name"] not in SUMMARY:
            continue
        ours = found["ours"]
        rows.append(
            [
                f"{model['name']}, {model['bytes'] / 1e9:.2f} GB",
                f"{ours['later']['median']:.2f} s (first {ours['first']['median']:.2f})",
                _judged_median(found["vllm"], "later"),
                *(times(found[f"{ratio}, later"], 1) for ratio in RATIOS),
                _most(found),
            ]
        )
    columns = ("model", "this plugin", "vLLM's own", *RATIOS.values(), "peak extra memory")
    return table(columns, rows)


def _main(report: dict[str, Any]) -> str:
    rows = []
    for model, way, found in ways_of(report):
        ours, own, under = found["ours"], found["vllm"], model["summary"]
        size = f"{model['bytes'] / 1e9:.2f} GB, {model['tensors']:,} tensors"
        for when in WHENS:
            what = ", ".join(part for part in (model["name"], way, size) if part)
            rows.append(
                [
                    what if when == "first" else "",
                    when,
                    _seconds(ours[when]),
                    _judged(own, when),
                    f"{_middle(under['floor'])} ({_middle(under['copy'])} + {_middle(under['process'])})",
                    plainly(under, 2),
                    *(times(found[f"{ratio}, {when}"], 1) for ratio in RATIOS),
                    _extra(found, when),
                ]
            )
    columns = (
        "model",
        "reload",
        "this plugin",
        "vLLM's own",
        "floor (copy + process)",
        "plain (read + process + hash)",
    )
    return table((*columns, *RATIOS.values(), "peak extra memory"), rows)


RATIOS = {
    "ours over floor": "ours ÷ floor",
    "vllm over ours": "vLLM ÷ ours",
    "restart over ours": "restart ÷ ours",
}


def _stages(report: dict[str, Any]) -> str:
    """Seconds of each stage of a later reload."""
    rows = []
    for model, way, found in ways_of(report):
        stages = found["ours"]["stages"]["later"]
        if "read" in stages:  # older reports count reading as loading
            inside = stages.get("digest", 0.0)  # made in the commit in older reports
            parts = [stages["read"], stages["load"], stages["process"], stages["commit"] - inside]
            total, digest = stages["total"] - inside, stages.get("digest, asked for", inside)
            name = ", ".join(part for part in (model["name"], way) if part)
            rows.append([name, *(f"{one:.3f}" for one in (*parts, total - sum(parts), total, digest))])
    columns = ("later reload, seconds", "read", "load", "process", "commit", "rest", "total", "digest")
    return table(columns, rows)


OTHERS = {"Zen 5": "main-zen5", "Xeon": "main-xeon"}
"""Name of another processor -> file of the main table measured on it."""


def _processors(report: dict[str, Any]) -> str:
    """Ratios of later reloads on three processors: cases that were measured on all of them."""
    runs = [{(model["name"], way): found for model, way, found in ways_of(report)}]
    runs += [
        {(model["name"], way): found for model, way, found in ways_of(_report(n))} for n in OTHERS.values()
    ]
    rows = [
        [", ".join(part for part in case if part)]
        + [times(run[case][f"{ratio}, later"], 2) for ratio in RATIOS for run in runs]
        for case in runs[0]
        if all(case in run for run in runs)
    ]
    columns = [f"{ratio}, {name}" for ratio in RATIOS.values() for name in ("Zen 4", *OTHERS)]
    return table(("later reload", *columns), rows)


def _axis(report: dict[str, Any]) -> str:
    """Tables whose models differ in the number of tensors or of bytes."""
    rows = []
    for model, _, found in ways_of(report):
        ours, own = found["ours"], found["vllm"]
        plan = ours["stages"]["first"]["plan"]
        rows.append(
            [
                f"{model['tensors']:,}" if report["axis"] == "tensors" else f"{model['bytes'] / 1e9:.2f} GB",
                f"{_seconds(ours['first'])} (plan {plan:.2f})",
                _seconds(ours["later"]),
                _judged(own, "later"),
                _middle(model["summary"]["floor"]),
                *(_extra(found, when) for when in WHENS),
            ]
        )
    extra = ("peak extra memory, first", "later")
    return table((report["axis"], "first", "later", "later, vLLM's own", "floor", *extra), rows)


def _ways(report: dict[str, Any]) -> str:
    """Tables of one model reloaded in several ways."""
    rows = []
    for _, way, found in ways_of(report):
        ours, own = found["ours"], found["vllm"]
        rows.append([way, *(_seconds(ours[when]) for when in WHENS), _judged(own, "later"), _most(found)])
    return table(("reload", "first", "later", "later, vLLM's own", "peak extra memory"), rows)


def _replay(report: dict[str, Any]) -> str:
    rows = []
    for model, way, found in ways_of(report):
        ours, own = found["ours"], _judged(found["vllm"], "later") if way == "replayed" else ""
        plan = ours["stages"]["first"].get("plan", 0.0)
        first = f"{_seconds(ours['first'])}" + (f" (plan {plan:.2f})" if plan else "")
        rows.append([model["name"] if own else "", way, first, _seconds(ours["later"]), own])
    return table(("model", "weights", "first", "later", "vLLM's own"), rows)


def _roads(report: dict[str, Any]) -> str:
    rows = [
        [
            model["name"],
            way,
            _seconds(found["ours"]["first"]),
            _seconds(found["ours"]["later"]),
            _most(found),
        ]
        for model, way, found in ways_of(report)
    ]
    return table(("model", "the weights come by", "first", "later", "peak extra memory"), rows)


def _order(report: dict[str, Any]) -> str:
    rows = []
    for _, way, found in ways_of(report):
        comes, _, policy = way.partition(", ")
        spilled = f"{(found['ours']['spilled'] or 0) / MIB:,.0f} MiB"
        own = _judged(found["vllm"], "later") if policy == "auto" else ""
        rows.append([f"`{policy}`", comes, _seconds(found["ours"]["later"]), own, _most(found), spilled])
    columns = ("policy", "the weights come", "later reloads", "vLLM's own", "peak extra memory")
    return table((*columns, "through a file"), rows)


def _repeated(report: dict[str, Any]) -> str:
    rows = []
    for model, way, found in ways_of(report):
        for side, label in (("ours", "this plugin"), ("vllm", "vLLM's own")):
            each = ", ".join(f"{one['seconds']:.2f}" for one in model["runs"][way][side][0]["reloads"])
            rows.append([label, each, f"{found[side]['grown'] / MIB:,.0f} MiB"])
    return table(("side", "seconds of each reload of one process", "grown since the first"), rows)


def _formats(report: dict[str, Any]) -> str:
    """Most extra memory of reloads from each format on disk."""
    promised = f"{(report['largest'] + BEYOND) / MIB:,.0f} MiB"
    rows = [[row["format"], f"{peak_of(row) / MIB:,.0f} MiB", promised] for row in report["rows"]]
    return table(("format", "peak extra memory", "promised at most"), rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "summary": _summary,
    "main": _main,
    "stages": _stages,
    "processors": _processors,
    "tensors": _axis,
    "bytes": _axis,
    "changed": _ways,
    "disk": _ways,
    "replay": _replay,
    "order": _order,
    "roads": _roads,
    "repeated": _repeated,
    "formats": _formats,
}


# -- cells ----------------------------------------------------------------------------------------


def _seconds(found: dict[str, float] | None) -> str:
    return seconds(found, 2)


def _middle(found: dict[str, float] | None) -> str:
    return middle(found, 2)


def _judged_median(own: dict[str, Any], when: str) -> str:
    """The median of vLLM's own reload, and what was wrong with its answers."""
    wrong = "" if own["verdict"] == "right" else f", **{own['verdict']}**"
    return f"{_middle(own[when])} s{wrong}"


def _judged(own: dict[str, Any], when: str) -> str:
    """Seconds of vLLM's own reload, and what was wrong with its answers."""
    wrong = "" if own[when] is None or own["verdict"] == "right" else f", **{own['verdict']}**"
    return _seconds(own[when]) + wrong


def _extra(found: dict[str, Any], when: str) -> str:
    return f"{found['ours']['extra'][when] / MIB:,.0f} of {found['promised'] / MIB:,.0f} MiB"


def _most(found: dict[str, Any]) -> str:
    most = max(found["ours"]["extra"].values())
    return f"{most / MIB:,.0f} of {found['promised'] / MIB:,.0f} MiB"


def main() -> None:
    """Write the tables into the documents, or compare them."""
    different = [path for path in DOCUMENTS if filled(path.read_text()) != path.read_text()]
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(f"{path} differs from the results" for path in different) or 0)
    for path in different:
        path.write_text(filled(path.read_text()))
        print(f"written: {path}")


if __name__ == "__main__":
    main()
