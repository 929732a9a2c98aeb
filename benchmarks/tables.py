"""The tables: which models are reloaded in which ways, how that is measured, and the summary."""

import random
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import machine
import models
from models import DENSE, EXPERTS, LARGE, MANY, Model
from tqdm import tqdm
from trials import Processes

SIDES = ("ours", "vllm")
BEYOND = 128 * machine.MIB
"""Bytes that a reload may take beside the largest layer, and one copy of the model where it keeps one."""


@dataclass(frozen=True)
class Way:
    """One way to reload an engine: which weights, from where, under which options."""

    name: str = ""
    to: str = "B"
    """The checkpoint that alternates with A."""
    changed: float = 1
    """The share of the layers in which it differs from A."""
    only_changed: bool = False
    """Whether only the changed weights are sent, as a partial update."""
    comes: str = "folder"
    """``folder``, an iterator in order (``ordered``) or at random (``shuffled``), or ``pushed``: a call of
    ``model.load_weights`` on the served model for each tensor. On an accelerator also ``device``, an iterator
    through one buffer there, and ``streams``, chunks on two of its streams in turn."""
    spare: float | None = None
    """Free memory of the accelerator, as a share of the weights' bytes; None: what the engine leaves."""
    asleep: int = 0
    """The level of ``sleep`` that the engine comes from; 0 is none."""
    disk: str = "warm"
    """``cold``: the files are not in the page cache."""
    by_loader: bool = False
    """Whether the model's own loader takes the weights, in a block of ``restore_for_reloading``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the reload, for this package only: vLLM's own reload has none."""
    sides: tuple[str, ...] = SIDES

    def steps(self, folders: Mapping[str, str], reloads: int, side: str) -> list[dict[str, Any]]:
        """The reloads of one process, to the checkpoint and to A in turn; see ``trials.time_reloads``."""
        options = dict(self.options) if side == "ours" else {}
        names = [(self.to, "A")[turn % 2] for turn in range(reloads)]
        return [
            {
                "to": name,
                "folder": folders[f"{name} for {self.to}" if self.only_changed else name],
                "comes": self.comes,
                "disk": self.disk,
                "by_loader": self.by_loader,
                "spare": self.spare,
                "asleep": self.asleep,
                "options": options,
            }
            for name in names
        ]


@dataclass(frozen=True)
class Table:
    """One table: its models, the ways of reloading each, and how often."""

    name: str
    title: str
    models: tuple[Model, ...]
    ways_of: Callable[[Model], tuple[Way, ...]]
    rounds: int = 1
    """Processes of each side; each gives one sample of a first reload and of a restart."""
    reloads: int = 6
    """Reloads in each process, the first included."""
    graphs: bool = False
    """Whether engines must have captured CUDA graphs at their start."""
    axis: str = ""
    """The axis of the plot: ``tensors`` or ``bytes``; empty where models do not differ along one."""


WHOLE = Way()
STREAMING = Way("streaming", options={"policy": "streaming"}, sides=("ours",))
ONLINE = {"quantization": "test_int8_meta"}
"""INT8 per channel, made from bf16 layer by layer while loading, as vLLM's own FP8 is on a GPU."""

MAIN = (
    Model("dense", DENSE),
    Model("8 layers × 128 experts", EXPERTS),
    Model("20,000 tensors", MANY),
    Model("dense, INT8 W8A8", DENSE, "w8a8"),
    Model("dense, W4A16", DENSE, "w4a16"),
    Model("dense, INT8 online", DENSE, options=ONLINE),
    Model("dense, 4 GB", LARGE),
)


def _in_experts(experts: int, inner: int) -> dict[str, int]:
    """0.4 GB in 16 layers with this number of experts of this inner size."""
    return {"layers": 16, "hidden": 96, "vocabulary": 8192, "experts": experts, "inner": inner}


TENSORS = (
    Model("1 k", _in_experts(21, 2048)),
    Model("4 k", _in_experts(84, 512)),
    Model("16 k", _in_experts(336, 128)),
    Model("64 k", _in_experts(1344, 32)),
)
BYTES = (
    Model("0.25 GB", DENSE | {"hidden": 512, "inner": 1536, "vocabulary": 16384}),
    Model("0.5 GB", DENSE | {"hidden": 768, "inner": 1792, "vocabulary": 24576}),
    Model("1 GB", DENSE),
    Model("2 GB", DENSE | {"hidden": 1408, "inner": 4736, "vocabulary": 45056}),
)
SHARES = {"none": 0, "1/8": 1 / 8, "1/2": 1 / 2, "all": 1}


def _of_main(model: Model) -> tuple[Way, ...]:
    return (WHOLE, STREAMING) if model.name == "dense" else (WHOLE,)


def _whole(_: Model) -> tuple[Way, ...]:
    return (WHOLE,)


def _changed(_: Model) -> tuple[Way, ...]:
    whole = [Way(f"{name} of the layers", f"B, {name}", share) for name, share in SHARES.items()]
    parts = [
        replace(
            way,
            name=f"{way.name}, only those sent",
            only_changed=True,
            options={"partial": True},
            sides=("ours",),
        )
        for way in whole
        if way.changed
    ]
    return (*whole, *parts)


def _orders(_: Model) -> tuple[Way, ...]:
    policies = {
        "auto": ("folder", "ordered", "shuffled"),
        "host": ("folder", "ordered", "shuffled"),
        "spill": ("ordered", "shuffled"),
        "reread": ("folder",),
        "streaming": ("folder", "ordered", "shuffled"),
    }
    return tuple(
        Way(
            f"{comes}, {policy}",
            comes=comes,
            options={"policy": policy},
            sides=SIDES if policy == "auto" else ("ours",),
        )
        for policy, all_comes in policies.items()
        for comes in all_comes
    )


def _disks(_: Model) -> tuple[Way, ...]:
    return Way("warm"), Way("cold", disk="cold")


def _replayed(_: Model) -> tuple[Way, ...]:
    replayed = Way("replayed", comes="ordered", options={"policy": "host"})
    return replayed, Way("by the model's loader", comes="ordered", by_loader=True, sides=("ours",))


def _roads(_: Model) -> tuple[Way, ...]:
    iterator = Way("ordered iterator", comes="ordered", options={"policy": "host"})
    return iterator, Way("pushed, a call a tensor", comes="pushed", sides=("ours",))


TABLES = {
    table.name: table
    for table in (
        Table("main", "Reloads from disk", MAIN, _of_main, rounds=5),
        Table("tensors", "The same bytes in more and more tensors", TENSORS, _whole, axis="tensors"),
        Table("bytes", "More and more bytes in the same number of tensors", BYTES, _whole, axis="bytes"),
        Table("changed", "Share of the layers that changed", MAIN[:1], _changed),
        Table("order", "Folder, ordered and shuffled iterator, under each policy", MAIN[:1], _orders),
        Table("disk", "Warm and cold page cache", MAIN[:1], _disks),
        Table(
            "replay", "Weights by the copy plan, and by the model's loader", MAIN[:3], _replayed, reloads=6
        ),
        Table("roads", "An iterator, and a live push of one call a tensor", (MAIN[0], MAIN[2]), _roads),
        Table("repeated", "First and repeated reloads", MAIN[:1], _whole, reloads=10),
    )
}


# -- measuring ------------------------------------------------------------------------------------


def measure(
    table: Table, model: Model, processes: Processes, root: Path, profile: bool = False
) -> dict[str, Any]:
    """Measure one model in all its ways, and compare every answer with a cold start's.

    Raises:
        SystemExit: this package or the floor's engine answered differently from a cold start, or failed.

    """
    ways = table.ways_of(model)
    jobs = 2 + sum(table.rounds * len(way.sides) for way in ways)
    with tqdm(total=jobs, desc=f"{table.name}: {model.name}", unit="process", file=sys.stdout) as progress:
        folders = write_all(model, ways, root)
        progress.update()
        common = {"options": dict(model.options)}
        whole = {name: folder for name, folder in folders.items() if " for " not in name}
        truth = processes.do({"task": "cold", "folders": whole} | common, plugin=False)
        progress.update()
        common["folders"] = folders
        runs: dict[str, dict[str, list]] = {way.name: {side: [] for side in way.sides} for way in ways}
        for number in range(table.rounds):
            for way, side in turns(ways, number):
                job = {"task": "reloads", "steps": way.steps(folders, table.reloads, side)} | common
                if side == "ours":
                    first = way is ways[0]
                    job |= {"floor_of": way.to if first else None, "profile": profile and number == 0}
                run = judge(ask(processes, job, side), truth)
                if side == "ours":
                    assert_right(f"{model.name} {way.name}, round {number}", run, table.graphs)
                    assert_loaded(way, run)
                runs[way.name][side].append(run)
                progress.update()
    measured = {
        "size": dict(model.size),
        "form": model.form,
        "bytes": models.bytes_of(folders[ways[0].to]),
        "tensors": models.tensors_of(folders[ways[0].to]),
        "largest_layer": models.largest_layer(model.size),
        "beside": {way.name: beside(way, ways) for way in ways},
        "runs": runs,
    }
    return measured | {"summary": summary(measured)}


def beside(way: Way, ways: tuple[Way, ...]) -> str:
    """The way whose figures of vLLM's own reload are compared: the same weights from the same place."""
    comes = "ordered" if way.comes == "pushed" else way.comes  # vLLM's own has no live push
    same = [other for other in ways if (other.to, other.comes, other.disk) == (way.to, comes, way.disk)]
    return next(other.name for other in same if "vllm" in other.sides)


def turns(ways: tuple[Way, ...], number: int) -> list[tuple[Way, str]]:
    """Every way and side once, in another order each round."""
    result = [(way, side) for way in ways for side in way.sides]
    random.Random(number).shuffle(result)
    return result


def write_all(model: Model, ways: tuple[Way, ...], root: Path) -> dict[str, str]:
    """Write the checkpoints that the ways need; returns name -> folder."""
    folders = {"A": str(models.write(root / "A", model, models.SEEDS["A"]))}
    for way in ways:
        if way.to not in folders:
            path = root / f"B{len(folders)}"
            folders[way.to] = str(models.write(path, model, models.SEEDS["B"], way.changed))
        if way.only_changed:
            for name in (way.to, "A"):
                path, whole = root / f"part{len(folders)}", Path(folders[name])
                part = models.write_changed(path, whole, model, way.changed)
                folders[f"{name} for {way.to}"] = str(part)
    return folders


def ask(processes: Processes, job: dict[str, Any], side: str) -> dict[str, Any]:
    """Have a job measured. Where vLLM's own reload kills the process, that is the result."""
    try:
        return processes.do(job, plugin=side == "ours")
    except RuntimeError as error:
        if side == "ours":
            raise
        return {"reloads": [], "ready": None, "error": "dies: " + str(error).splitlines()[0]}


def judge(run: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any]:
    """Replace each answer by whether it equals a cold start's, bit for bit."""
    for one in run["reloads"]:
        one["right"] = one.pop("answer") == truth[one["to"]]
    if "floor" in run:
        # The floor is measured on the checkpoint of the first reload.
        run["floor"]["right"] = run["floor"].pop("answer") == truth[run["reloads"][0]["to"]]
    return run


def assert_right(what: str, run: dict[str, Any], graphs: bool = False) -> None:
    """Raise SystemExit for wrong answers, an error, or CUDA graphs that were captured anew or not at all."""
    wrong = [f"reload {number}" for number, one in enumerate(run["reloads"]) if not one["right"]]
    if wrong:
        raise SystemExit(f"{what}: reload_plugin answered differently from a cold start: {', '.join(wrong)}")
    if run["error"] is not None:
        raise SystemExit(f"{what}: reload_plugin failed: {run['error']}")
    before, after = run["graphs"]
    if before != after or (graphs and not before):
        raise SystemExit(f"{what}: {before} CUDA graphs at the start and {after} after the reloads")
    if not run.get("floor", {}).get("right", True):
        raise SystemExit(f"{what}: the engine that the floor was measured on answered differently")


def assert_loaded(way: Way, run: dict[str, Any]) -> None:
    """Raise SystemExit where a way that measures the model's loader took the copy plan."""
    replayed = sum(one.get("replayed", 0) for one in run["reloads"])
    if way.by_loader and replayed:
        raise SystemExit(f"{way.name}: {replayed} weights took the copy plan")


# -- what the figures come to ---------------------------------------------------------------------


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, spreads and ratios. `first` is the first reload of a process, `later` any other."""
    runs = measured["runs"]
    everything = [run for sides in runs.values() for side in sides.values() for run in side]
    floors = [run["floor"] for run in everything if "floor" in run]
    starts = [run["ready"] for sides in runs.values() for run in sides.get("vllm", [])]
    parts = ("copy", "process", "read", "once", "hash")
    result: dict[str, Any] = {part: spread([one[part] for one in floors]) for part in parts}
    result["floor"] = spread([one["copy"] + one["process"] for one in floors])
    result["plain"] = spread([one["read"] + one["once"] + one["hash"] for one in floors])
    result["restart"] = spread([seconds for seconds in starts if seconds is not None])
    result["ways"] = {
        name: _of_way(sides["ours"], runs[measured["beside"][name]]["vllm"], result, measured)
        for name, sides in runs.items()
    }
    return result


def _of_way(
    our_runs: list[dict[str, Any]],
    own_runs: list[dict[str, Any]],
    around: dict[str, Any],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Summary of one way: this package, vLLM's own, and the ratios."""
    ours, own = _of_side(our_runs), _of_side(own_runs)
    result: dict[str, Any] = {"ours": ours, "vllm": own}
    for when in ("first", "later"):
        result[f"ours over floor, {when}"] = ratio(ours[when], around["floor"])
        result[f"vllm over ours, {when}"] = ratio(own[when], ours[when])
        result[f"restart over ours, {when}"] = ratio(around["restart"], ours[when])
    # The first push of live weights is gathered, which takes a copy whatever its policy is.
    copies = any(one.get("old_generation") == "host" for run in our_runs for one in run["reloads"])
    result["promised"] = measured["largest_layer"] + BEYOND + copies * measured["bytes"]
    return result


def _of_side(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = [run["reloads"][0] for run in runs if run["reloads"]]
    later = [one for run in runs for one in run["reloads"][1:]]
    stages = {
        when: _medians([one["stages"] for one in ones]) for when, ones in (("first", first), ("later", later))
    }
    return {
        "first": spread([one["seconds"] for one in first]),
        "later": spread([one["seconds"] for one in later]),
        "extra": {"first": _most(first, "extra"), "later": _most(later, "extra")},
        "device_extra": {"first": _most(first, "device_extra"), "later": _most(later, "device_extra")},
        "from_disk": {"first": _least(first, "from_disk"), "later": _least(later, "from_disk")},
        "grown": _grown(runs),
        "spilled": _most([*first, *later], "spilled"),
        "old_generation": next((one.get("old_generation") for one in first), None),
        "stages": stages,
        "verdict": verdict(runs),
    }


def verdict(runs: list[dict[str, Any]]) -> str:
    """``right``, ``wrong``, or the error."""
    errors = sorted({run["error"] for run in runs if run["error"]})
    if errors:
        return errors[0] if errors[0].startswith("dies") else f"raises {errors[0]}"
    return "right" if all(one["right"] for run in runs for one in run["reloads"]) else "wrong"


def spread(seconds: list[float]) -> dict[str, float] | None:
    """Median, extremes and count; None of an empty list."""
    if not seconds:
        return None
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "count": len(seconds),
    }


def ratio(above: dict[str, float] | None, below: dict[str, float] | None) -> float | None:
    """Ratio of two medians; None where one was not measured."""
    return above["median"] / below["median"] if above and below else None


def _medians(stages: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each stage."""
    names = dict.fromkeys(name for one in stages for name in one)
    return {name: statistics.median(one.get(name, 0.0) for one in stages) for name in names}


def _most(ones: list[dict[str, Any]], name: str) -> int | None:
    return max((one[name] for one in ones if one.get(name) is not None), default=None)


def _least(ones: list[dict[str, Any]], name: str) -> int | None:
    return min((one[name] for one in ones if one.get(name) is not None), default=None)


def _grown(runs: list[dict[str, Any]]) -> int | None:
    """Growth of resident bytes from the first reload of a process to its last; the most of all processes."""
    return max(
        (run["reloads"][-1]["resident"] - run["reloads"][0]["resident"] for run in runs if run["reloads"]),
        default=None,
    )
