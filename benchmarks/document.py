"""Markdown tables from the JSON that a benchmark has written."""

from collections.abc import Iterator
from typing import Any

from machine import MIB

NOTHING = "–"
WHENS = ("first", "later")
COLUMNS = (
    "model",
    "reload",
    "this package",
    "vLLM's own",
    "its answers",
    "engine restart",
    "floor (copy + process)",
    "plain reads, processed once, hashed (read + process + hash)",
    "ours ÷ floor",
    "vLLM ÷ ours",
    "restart ÷ ours",
    "peak extra memory",
    "promised at most",
    "peak extra, vLLM's own",
)
NOTE = (
    "Seconds are medians [least–most]. An engine restart runs from the start of a new process, imports "
    "included, to an engine that takes requests; its first answer is not included. The floor copies mapped "
    "files and processes all layers, both into warm memory; the next column is plain reads of the files into "
    "one small buffer, processing each layer for the first time, and hashing all bytes. Peak extra "
    "memory is what the process had resident at most (the kernel's VmHWM, mapped files included), less what "
    "it had before."
)


def whole(report: dict[str, Any]) -> str:
    """The Markdown of one table's JSON: main table, note, extra tables, stages."""
    parts = [f"# {report['title']}", main_table(report), NOTE, *extras(report)]
    parts += ["Where this package's time goes, median seconds of each stage:", stages_table(report)]
    return "\n\n".join(parts) + "\n"


def main_table(report: dict[str, Any]) -> str:
    """One row for each model, way of reloading, and first or later reload."""
    device = any(way["ours"]["device_extra"]["first"] is not None for _, _, way in ways_of(report))
    columns = (*COLUMNS, "peak extra on the device", "vLLM's own on the device") if device else COLUMNS
    rows = [
        [f"{what_of(model, name)}", when, *figures(model, way, when, device)]
        for model, name, way in ways_of(report)
        for when in WHENS
    ]
    return table(columns, rows)


def ways_of(report: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """(model with its name, name of the way, summary of the way)."""
    for name, model in report["models"].items():
        for way, found in model["summary"]["ways"].items():
            yield model | {"name": name}, way, found


def what_of(model: dict[str, Any], way: str) -> str:
    """The model, its size, and the way of reloading if it has a name."""
    what = f"{model['name']}: {model['bytes'] / 1e9:.2f} GB, {model['tensors']:,} tensors"
    return f"{what}; {way}" if way else what


def figures(model: dict[str, Any], way: dict[str, Any], when: str, device: bool) -> list[str]:
    """The cells of one row, after its name."""
    found, ours, own = model["summary"], way["ours"], way["vllm"]
    right = own["verdict"] == "right"
    cells = [
        seconds(ours[when]),
        seconds(own[when]),
        "right" if right else f"**{own['verdict']}**",
        seconds(found["restart"]),
        f"{seconds(found['floor'])} ({middle(found['copy'])} + {middle(found['process'])})",
        plainly(found),
        times(way[f"ours over floor, {when}"]),
        times(way[f"vllm over ours, {when}"]),
        times(way[f"restart over ours, {when}"]),
        mib(ours["extra"][when]),
        mib(way["promised"]),
        mib(own["extra"][when]),
    ]
    if device:
        cells += [mib(ours["device_extra"][when]), mib(own["device_extra"][when])]
    return cells


def extras(report: dict[str, Any]) -> list[str]:
    """Tables that only some reports have."""
    makers = {"tensors": growth, "bytes": growth, "disk": from_disk, "order": spilled, "repeated": repeated}
    maker = makers.get(report["table"])
    return [text] if maker and (text := maker(report)) else []


def growth(report: dict[str, Any]) -> str:
    """How the time grows from the first model of an axis to the last."""
    models = list(report["models"].values())
    if len(models) < 2:
        return ""
    first, last = models[0], models[-1]
    rows = [["tensors", times(last["tensors"] / first["tensors"])]]
    rows += [["bytes", times(last["bytes"] / first["bytes"])]]
    for side, label in (("ours", "this package"), ("vllm", "vLLM's own")):
        for when in WHENS:
            ends = [one["summary"]["ways"][""][side][when] for one in (first, last)]
            grown = ends[1]["median"] / ends[0]["median"] if all(ends) else None
            rows.append([f"seconds of {label}, {when}", times(grown)])
    floors = [one["summary"]["floor"]["median"] for one in (first, last)]
    rows.append(["seconds of the floor", times(floors[1] / floors[0])])
    return table(("from the first model to the last", "grows"), rows)


def from_disk(report: dict[str, Any]) -> str:
    """Bytes fetched from storage while a reload was timed: the least of all reloads."""
    rows = [
        [
            what_of(model, name),
            mib(model["bytes"]),
            *(mib(way[s]["from_disk"][w]) for s in ("ours", "vllm") for w in WHENS),
        ]
        for model, name, way in ways_of(report)
    ]
    return table(("fetched from storage", "checkpoint", "first", "later", "vLLM's, first", "later"), rows)


def spilled(report: dict[str, Any]) -> str:
    """Bytes that went through a file because staging was full, and the rollback source."""
    rows = [
        [what_of(model, name), way["ours"]["old_generation"], mib(way["ours"]["spilled"])]
        for model, name, way in ways_of(report)
    ]
    return table(("reload", "old weights until then", "through a file"), rows)


def repeated(report: dict[str, Any]) -> str:
    """Seconds of each reload of one process, and its growth in resident bytes since the first."""
    rows = []
    for model, name, way in ways_of(report):
        for side, label in (("ours", "this package"), ("vllm", "vLLM's own")):
            runs = model["runs"][name][side]
            each = ", ".join(f"{one['seconds']:.3f}" for one in runs[0]["reloads"])
            rows.append([what_of(model, name), label, each, mib(way[side]["grown"])])
    return table(("model", "side", "seconds of each reload", "grown since the first"), rows)


def stages_table(report: dict[str, Any]) -> str:
    """Median seconds of each stage of this package's reloads."""
    rows = [
        (f"{what_of(model, name)}, {when}", way["ours"]["stages"][when])
        for model, name, way in ways_of(report)
        for when in WHENS
    ]
    names = list(dict.fromkeys(name for _, stages in rows for name in stages))
    return table(
        ("reload", *names), [[what, *(f"{s.get(name, 0):.3f}" for name in names)] for what, s in rows]
    )


def profiles(report: dict[str, Any]) -> str:
    """The top functions of one later reload of each way; empty without ``--profile``."""
    return "\n\n".join(
        f"{what_of(model, name)}: {run['profile']}"
        for model, name, _ in ways_of(report)
        for run in model["runs"][name]["ours"]
        if "profile" in run
    )


# -- cells ----------------------------------------------------------------------------------------


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("--- |", "---|") for line in lines
    )


def seconds(found: dict[str, float] | None, digits: int = 3) -> str:
    """Median, least and most, in seconds."""
    if found is None:
        return NOTHING
    return f"{middle(found, digits)} s [{found['min']:.{digits}f}–{found['max']:.{digits}f}]"


def middle(found: dict[str, float] | None, digits: int = 3) -> str:
    """The median, in seconds."""
    return NOTHING if found is None else f"{found['median']:.{digits}f}"


def plainly(found: dict[str, Any], digits: int = 3) -> str:
    """Seconds of plain reads, of processing for the first time and of hashing, where measured."""
    if found.get("hash") is None:
        return NOTHING
    plain, read, once, hashed = (middle(found[part], digits) for part in ("plain", "read", "once", "hash"))
    return f"{plain} ({read} + {once} + {hashed})"


def times(value: float | None, digits: int = 2) -> str:
    """A ratio."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def mib(value: int | None) -> str:
    """Bytes in MiB."""
    return NOTHING if value is None else f"{round(value / MIB):,} MiB"
