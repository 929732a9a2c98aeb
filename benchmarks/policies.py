"""What each policy of a reload costs: memory at the peak and seconds, for ordered and shuffled streams.

One process for each row. The limit beside each figure is what the package promises: a layer and 128 MiB, and
one copy of the model under `host`. The answer after the last reload is compared with a cold start's.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import engine
import models
from memory import MIB, OPTIONS, Peak, resident
from reload import ask_cold, bytes_of, machine, warm_up
from rich.console import Console
from tqdm import tqdm

ROWS = (
    ("host", "folder"),
    ("host", "ordered"),
    ("host", "shuffled"),
    ("spill", "ordered"),
    ("spill", "shuffled"),
    ("reread", "folder"),
    ("streaming", "folder"),
    ("streaming", "ordered"),
    ("streaming", "shuffled"),
)
"""Policy, and how the weights come: from a folder, or as a stream in or out of the layers' order."""


def stream(folder: str, shuffled: bool, seed: int) -> Iterator[tuple[str, Any]]:
    """The checkpoint one tensor at a time, in one buffer that is there before, as a trainer's is."""
    import torch

    from reload_plugin.sources.safetensors_files import SafetensorsSource

    source = SafetensorsSource([str(path) for path in Path(folder).glob("*.safetensors")], "the stream")
    infos = list(source.infos())
    infos.sort(key=lambda info: [int(part) for part in info.name.split(".") if part.isdigit()])
    if shuffled:
        random.Random(seed).shuffle(infos)
    buffer = torch.zeros(max(info.nbytes for info in infos), dtype=torch.uint8)

    def tensors() -> Iterator[tuple[str, Any]]:
        for info in infos:
            flat = buffer[: info.nbytes].view(info.dtype)
            source.read_spans(info.name, [(0, flat.numel())], flat)
            yield info.name, flat.view(info.shape)

    return tensors()


def run_policy(folders: dict[str, str], policy: str, how: str, reloads: int) -> dict[str, Any]:
    """Start on A, reload B, A, B, …; extra memory at each peak, seconds, and the last answer."""
    with engine.engine(folders["A"], **OPTIONS) as llm:
        engine.answer(llm)
        runs = []
        for turn in range(reloads):
            side = "BA"[turn % 2]
            warm_up(folders[side])
            weights = None if how == "folder" else stream(folders[side], how == "shuffled", turn)
            gc.collect()
            start = resident()
            asked = {"policy": policy} | ({"weights_path": folders[side]} if weights is None else {})
            with Peak() as peak:
                started = time.perf_counter()
                llm.collective_rpc(reload_in_worker, args=(asked, weights))
                seconds = time.perf_counter() - started
            extra = {"anon": peak.anon - start["anon"], "kernel_rss": peak.kernel_rss - start["rss"]}
            runs.append({"seconds": seconds, "extra": extra, "after": resident()["rss"]})
        report = llm.collective_rpc("reload_status")[0]["report"]
        return {"runs": runs, "side": side, "answer": engine.answer(llm), "spilled": report["spilled_bytes"]}


def reload_in_worker(worker: Any, options: dict[str, Any], weights: Any) -> None:
    """The runner's own call, with our options."""
    worker.model_runner.reload_weights(weights_iterator=weights, **options)


def work(task: str, **arguments: Any) -> Any:
    """A child's job."""
    return {"cold": ask_cold, "policy": run_policy}[task](**arguments)


def measure(size: dict[str, int], reloads: int, only: str | None, root: Path) -> dict[str, Any]:
    """Every row, or those of one policy."""
    folders = {side: str(models.write(root / side, size, seed)) for side, seed in (("A", 1), ("B", 2))}
    truth = engine.in_child(__file__, {"task": "cold", "folders": folders}, plugin=False)
    rows = []
    chosen = [row for row in ROWS if only in (None, row[0])]
    for policy, how in tqdm(chosen, unit="process", file=sys.stdout):
        job = {"task": "policy", "folders": folders, "policy": policy, "how": how, "reloads": reloads}
        found = engine.in_child(__file__, job, plugin=True)
        if found.pop("answer") != truth[found["side"]]:
            raise SystemExit(f"{policy}, {how}: another answer than a cold start's")
        rows.append({"policy": policy, "how": how} | found)
    return {"bytes": bytes_of(folders["B"]), "largest": largest(size), "rows": rows}


def largest(size: dict[str, int]) -> int:
    """Bytes of the largest layer in load format."""
    return 2 * max(
        size["vocabulary"] * size["hidden"],
        *(shape[0] * shape[1] for name, shape in models.shapes(size).items() if len(shape) == 2),
    )


def markdown(report: dict[str, Any]) -> str:
    """One line a row."""
    lines = [
        "| policy | the weights come | peak extra memory | promised at most | through a file | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        copy = report["bytes"] if row["policy"] == "host" else 0
        peak = max(one["extra"]["kernel_rss"] for one in row["runs"]) / MIB
        seconds = statistics.median(one["seconds"] for one in row["runs"][1:])
        limit = (copy + report["largest"]) / MIB + 128
        lines.append(
            f"| `{row['policy']}` | {row['how']} | {peak:,.0f} MiB | {limit:,.0f} MiB | "
            f"{row['spilled'] / MIB:,.0f} MiB | {seconds:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, write JSON and Markdown, print the table."""
    parser = argparse.ArgumentParser(description="memory and seconds of each policy")
    parser.add_argument("--model", choices=models.DEFAULTS, default="dense")
    parser.add_argument("--policy", choices=sorted({policy for policy, _ in ROWS}), help="only this one")
    parser.add_argument("--reloads", type=int, default=4, help="reloads in each process, 2 or more")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        measured = measure(models.sizes(arguments.model), arguments.reloads, arguments.policy, Path(root))
    report = {"machine": machine(), "model": arguments.model} | measured
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "policies.json").write_text(json.dumps(report, indent=1))
    (arguments.output / "policies.md").write_text(markdown(report) + "\n")
    Console(width=None if sys.stdout.isatty() else 240).print(markdown(report), markup=False)


if __name__ == "__main__":
    if not engine.as_child(work):
        main()
