"""How much memory a reload from disk takes: extra at its peak, and what is left behind after ten.

One process a side. A thread samples resident memory while a reload runs; the kernel's own high-water mark,
reset before each, says whether the samples missed the peak. RSS counts the pages of the checkpoint's files
that happen to be mapped, which the kernel can drop at will; RssAnon counts what the process itself holds.
"""

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import engine
import models
import psutil
from reload import ask_cold, bytes_of, machine, warm_up
from rich.console import Console
from tqdm import tqdm

OPTIONS = {"max_num_seqs": 4}
MIB = 1 << 20


class Peak:
    """While entered, samples this process every millisecond: `rss`, `anon`, and at the end `kernel_rss`."""

    def __enter__(self) -> "Peak":
        self.rss = self.anon = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.kernel_rss = high_water_mark()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            now = resident()
            self.rss, self.anon = max(self.rss, now["rss"]), max(self.anon, now["anon"])


def resident() -> dict[str, int]:
    """Bytes in memory: all, and those that belong to no file and no shared block (the kernel's RssAnon)."""
    memory = psutil.Process().memory_info()
    return {"rss": memory.rss, "anon": memory.rss - memory.shared}


def high_water_mark() -> int:
    """The largest RSS since the last reset, bytes (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def watch_reloads(folders: dict[str, str], reloads: int) -> dict[str, Any]:
    """Start on A, reload B, A, B, …; memory before, at each peak and after each, and the last answer."""
    with engine.engine(folders["A"], **OPTIONS) as llm:
        engine.answer(llm)
        gc.collect()
        before, runs = resident(), []
        for turn in range(reloads):
            side = "BA"[turn % 2]
            warm_up(folders[side])
            start = resident()
            with Peak() as peak:
                started = time.perf_counter()
                llm.collective_rpc("reload_weights", kwargs={"weights_path": folders[side]})
                seconds = time.perf_counter() - started
            gc.collect()
            extra = {"rss": peak.rss - start["rss"], "anon": peak.anon - start["anon"]}
            extra["kernel_rss"] = peak.kernel_rss - start["rss"]
            runs.append({"side": side, "seconds": seconds, "extra": extra, "after": resident()})
        return {"before": before, "runs": runs, "side": side, "answer": engine.answer(llm)}


def work(task: str, **arguments: Any) -> Any:
    """A child's job."""
    return {"cold": ask_cold, "watch": watch_reloads}[task](**arguments)


def measure(kind: str, size: dict[str, int], reloads: int, root: Path) -> dict[str, Any]:
    """Both sides, one after the other."""
    with tqdm(total=4, desc=kind, unit="process", file=sys.stdout) as progress:
        folders = {}
        for side, seed in (("A", 1), ("B", 2)):
            folders[side] = str(models.write(root / side, size, seed))
        progress.update()
        truth = engine.in_child(__file__, {"task": "cold", "folders": folders}, plugin=False)
        progress.update()
        report: dict[str, Any] = {"size": size, "bytes": bytes_of(folders["B"])}
        for name in ("ours", "vllm"):
            job = {"task": "watch", "folders": folders, "reloads": reloads}
            run = engine.in_child(__file__, job, plugin=name == "ours")
            run["right"] = run.pop("answer") == truth[run["side"]]
            report[name] = run | {"summary": summary(run)}
            progress.update()
    if not report["ours"]["right"]:
        raise SystemExit("reload_plugin answered differently from a cold start after the last reload")
    return report


def summary(run: dict[str, Any]) -> dict[str, float]:
    """The figures that matter, MiB."""
    first, *later = run["runs"]
    result = {"RSS before": run["before"]["rss"], "RssAnon before": run["before"]["anon"]}
    for key, label in (("anon", "RssAnon"), ("rss", "RSS"), ("kernel_rss", "VmHWM")):
        result[f"peak extra {label}, first"] = first["extra"][key]
        result[f"peak extra {label}, later"] = max(one["extra"][key] for one in later)
    for key, label in (("anon", "RssAnon"), ("rss", "RSS")):
        result[f"growth of {label}, whole run"] = run["runs"][-1]["after"][key] - run["before"][key]
        result[f"growth of {label}, after the first"] = run["runs"][-1]["after"][key] - first["after"][key]
    return {label: value / MIB for label, value in result.items()}


def markdown(report: dict[str, Any]) -> str:
    """The summaries beside each other."""
    model = report["model"]
    head = f"{report['kind']}, {model['bytes'] / MIB:,.0f} MiB, {len(model['ours']['runs'])} reloads"
    lines = [f"| MiB ({head}) | this package | vLLM's own |", "|---|---|---|"]
    for label, value in model["ours"]["summary"].items():
        lines.append(f"| {label} | {value:,.0f} | {model['vllm']['summary'][label]:,.0f} |")
    right = ["right" if model[name]["right"] else "**wrong**" for name in ("ours", "vllm")]
    return "\n".join([*lines, f"| answer after the last reload | {right[0]} | {right[1]} |"])


def main() -> None:
    """Read the command line, measure, write JSON and Markdown, print the table."""
    parser = argparse.ArgumentParser(description="resident memory of a reload from disk")
    parser.add_argument("--model", choices=models.DEFAULTS, default="dense")
    parser.add_argument("--reloads", type=int, default=10, help="2 or more")
    for name in models.SIZES:
        parser.add_argument(f"--{name}", type=int, help="size of the model, if not its own")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = parser.parse_args()
    if arguments.reloads < 2:
        parser.error("at least two reloads")
    size = models.sizes(arguments.model, **{name: getattr(arguments, name) for name in models.SIZES})
    report: dict[str, Any] = {"machine": machine(), "kind": arguments.model}
    with tempfile.TemporaryDirectory() as root:
        report["model"] = measure(arguments.model, size, arguments.reloads, Path(root))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "memory.json").write_text(json.dumps(report, indent=1))
    (arguments.output / "memory.md").write_text(markdown(report) + "\n")
    Console(width=None if sys.stdout.isatty() else 240).print(markdown(report), markup=False)
    print(f"written: {arguments.output / 'memory.json'} and memory.md")


if __name__ == "__main__":
    if not engine.as_child(work):
        main()
