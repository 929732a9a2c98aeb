"""Votes of many ranks against one real TCPStore: seconds and operations of the store as ranks grow.

    python -m tests.votes_at_scale 2 16 128 1024     # prints a Markdown table
    python -m tests.votes_at_scale --output benchmarks/results      # and writes votes.json, .md and .png

Ranks are threads of a few processes, each process with one connection. In the second column all get ready at
once; in the third one fails, and in the fourth one never comes, with a timeout of a second.
"""

import argparse
import json
import multiprocessing
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from reload_plugin import errors
from reload_plugin.ranks import votes

PROCESSES = 8
GOOD, FAILS, SILENT = "all commit", "one fails", "one never comes"
TIMEOUT = {GOOD: 60.0, FAILS: 60.0, SILENT: 1.0}


class Counting:
    """A store that counts its operations."""

    def __init__(self, store: Any) -> None:
        self.store, self.done = store, 0

    def __getattr__(self, name: str) -> Any:
        self.done += 1
        return getattr(self.store, name)


@dataclass
class Outcome:
    """What the ranks of one process saw of one vote."""

    seconds: float
    operations: int
    decisions: Counter


def process(first: int, count: int, ranks: int, port: int, pipe: Any) -> None:
    """Some of the ranks; each command is the kind of vote that comes next."""
    store = Counting(dist.TCPStore("127.0.0.1", port, is_master=False))
    number, odd = 0, ranks // 2
    pipe.send("ready")
    while (kind := pipe.recv()) is not None:
        number += 1
        before, started = store.done, time.monotonic()
        found = Counter()

        def vote(rank: int, kind: str = kind, number: int = number, found: Counter = found) -> None:
            mine = votes.Vote(store, votes.RankPlace("model/0", rank, ranks), str(number), [])
            mine.vote_timeout = TIMEOUT[kind]
            try:
                mine(ValueError("no") if kind == FAILS and rank == odd else None)
                found["committed" if mine.committed else "refused"] += 1
            except errors.RanksDisagreeError:
                found["refused"] += 1

        there = [rank for rank in range(first, first + count) if kind != SILENT or rank != odd]
        threads = [threading.Thread(target=vote, args=(rank,)) for rank in there]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(Outcome(time.monotonic() - started, store.done - before, found))


def measure(ranks: int) -> dict[str, Outcome]:
    """One vote of each kind; seconds of the slowest process, operations of all."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Not forked from here: the thread of a store may hold a lock just then.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "reload_plugin.ranks.votes"])
    share = -(-ranks // PROCESSES)
    pipes, children = [], []
    for first in range(0, ranks, share):
        here, there = context.Pipe()
        count = min(share, ranks - first)
        child = context.Process(target=process, args=(first, count, ranks, server.port, there), daemon=True)
        child.start()
        pipes.append(here)
        children.append(child)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    found = {}
    for kind in TIMEOUT:
        for pipe in pipes:
            pipe.send(kind)
        parts = [pipe.recv() for pipe in pipes]
        decisions = sum((part.decisions for part in parts), Counter())
        assert len(decisions) == 1, f"{ranks} ranks, {kind}: {decisions}"
        assert ("committed" in decisions) == (kind == GOOD), (kind, decisions)
        found[kind] = Outcome(
            max(part.seconds for part in parts), sum(part.operations for part in parts), decisions
        )
    for pipe, child in zip(pipes, children, strict=True):
        pipe.send(None)
        child.join(20)
    return found


def draw(rows: dict[int, dict[str, Outcome]], path: Path) -> None:
    """Plot seconds and operations against the ranks."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for kind in TIMEOUT:
        left.plot(list(rows), [row[kind].seconds for row in rows.values()], marker="o", label=kind)
        right.plot(list(rows), [row[kind].operations / ranks for ranks, row in rows.items()], marker="o")
    left.set_ylabel("seconds until the last rank knows")
    right.set_ylabel("operations of the store, each rank")
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("ranks")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, title=f"one never comes: timeout of {TIMEOUT[SILENT]:g} s")
    figure.suptitle("Votes against one TCPStore; ranks are threads of eight processes")
    figure.savefig(path, dpi=120)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", type=int, nargs="*", default=[2, 4, 16, 64, 128, 256, 512, 1024])
    parser.add_argument("--output", type=Path, help="a folder for votes.json, votes.md and votes.png")
    asked = parser.parse_args()
    lines = [
        "| ranks | " + " | ".join(f"{kind}: s | operations" for kind in TIMEOUT) + " |",
        "|---" * (1 + 2 * len(TIMEOUT)) + "|",
    ]
    print("\n".join(lines))
    rows = {}
    for ranks in asked.ranks:
        found = rows[ranks] = measure(ranks)
        cells = [f"{found[kind].seconds:.3f} | {found[kind].operations:,}" for kind in TIMEOUT]
        lines.append(f"| {ranks:,} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if asked.output is not None:
        told = {
            ranks: {kind: {"seconds": one.seconds, "operations": one.operations} for kind, one in row.items()}
            for ranks, row in rows.items()
        }
        (asked.output / "votes.json").write_text(json.dumps(told, indent=1))
        (asked.output / "votes.md").write_text("\n".join(["# Votes of many ranks", "", *lines, ""]))
        draw(rows, asked.output / "votes.png")


if __name__ == "__main__":
    main()
