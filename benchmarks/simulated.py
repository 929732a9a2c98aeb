"""Whole reloads of large models on the simulated device, by its virtual clock: every figure is simulated.

    python benchmarks/simulated.py [--models 8B ...] [--sources folder ...] [--output FOLDER]

What the clock counts:

- the device: each copy at the rate of its path (host to device 55 GB/s each way, from pageable memory
  9.7 GB/s, on the device 2.2 TB/s), 5 µs a launch, 20 µs a wait, streams and copy engines that run beside one
  another (`tests/sim_device/csrc/streams.cpp`);
- the host's Python and torch: *measured*, as processor time of the thread that reloads, between the calls of
  the device, on this machine. It runs on the same clock, so it overlaps with copies that are queued;
- reading files from the page cache and copies within host memory: bytes by the rates below, on several
  threads, and the time it takes to hand work to a thread.

What it does not count: kernels other than copies and fills are charged for their bytes alone; the time of
this simulation, which includes torch's allocation of device memory; other threads of the process that want
Python's lock; page faults of the sources; limits of the host's memory bandwidth. No byte moves while the
clock runs. Before that each model is reloaded with bytes, and values are compared with those that were sent.

A model has all its layers and tensors, each with 1/64 of its elements (1/8 of each width), and its payloads
count 64-fold; sizes of buffers are divided by 64 too. Norms and routers so count 8-fold, which is below 1 %
of the bytes; the budget of incomplete layers, which holds them, is divided by 8 for that reason.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import document
import machine
import plot
import torch
from safetensors.torch import save_file

from tests.engine.gpu_methods import checkpoints
from tests.engine.gpu_methods.rows import Row
from tests.sim_device.device import SimDevice
from tests.sim_device.loading import load

SCALE = 64
"""A model here has 1/SCALE of the elements, and payloads count SCALE-fold."""
BUS, MEMORY = 55e9, 2.2e12
"""Bytes a second: host to device, and a copy on the device; those of the simulated device."""
HOST_COPY, HOST_COPY_FRESH = 10.9e9, 2.7e9
"""Bytes a second of a core, measured on the machine of the results: into memory that is there, and into
memory whose pages are not there yet."""
READERS, TEAM = 4, 8
"""Threads that read files, and that copy to and from pinned memory."""
HANDOVER = 12e-6
"""Seconds that it takes to give a thread a copy and to hear that it is done, measured like the rates."""
SPARE = 0.08


@dataclass(frozen=True)
class Shape:
    """A dense model, or a mixture of experts, in the widths it has."""

    name: str
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def kind(self) -> str:
        return f"simulated {self.name}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8B", 32, 4096, 14336, 128256, 32, 8),
        Shape("30B-A3B", 48, 2048, 768, 151936, 32, 8, experts=128),
    )
}


def _tiny(shape: Shape) -> checkpoints.Tiny:
    """Its checkpoint with an eighth of each width."""
    hidden, inner, vocabulary = shape.hidden // 8, shape.inner // 8, shape.vocabulary // 8
    head, heads, kv_heads = 128, shape.heads // 8, shape.kv_heads // 8
    kind, architecture = (
        ("qwen3_moe", "Qwen3MoeForCausalLM") if shape.experts else ("llama", "LlamaForCausalLM")
    )
    more = (
        dict(checkpoints._MOE, num_experts=shape.experts, moe_intermediate_size=inner)
        if shape.experts
        else {}
    )
    config = checkpoints._config(
        kind,
        architecture,
        shape.layers,
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        **more,
    )

    def describe(_: dict[str, Any]) -> tuple[list[checkpoints.Linear], dict[str, checkpoints.Spec]]:
        sizes = {
            "HIDDEN": hidden,
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head,
            "VOCAB": vocabulary,
            "INTERMEDIATE": inner,
            "EXPERTS": shape.experts,
        }
        with mock.patch.multiple(checkpoints, **sizes):
            return (checkpoints._qwen3_moe if shape.experts else checkpoints._llama)(config)

    return checkpoints.Tiny(config, describe)


# -- what is not the device's and not Python's ----------------------------------------------------


class HostWork:
    """Stands in for reads of files and copies in host memory: time passes, and no byte moves."""

    def __init__(self, sim: SimDevice) -> None:
        self._sim = sim
        self.reset()

    def reset(self) -> None:
        """When each thread is done with what it was given, by the virtual clock: none has anything."""
        self._readers, self._team = [0.0] * READERS, [0.0] * TEAM

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """On the calling thread."""
        del source
        self._sim.advance(target.nbytes * SCALE / HOST_COPY)

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Callable[[], object]:
        """On a thread of a team, which waits for an event first. Returns what waits for the thread."""
        del target
        rate = HOST_COPY_FRESH if after is not None else HOST_COPY  # the undo log's memory is new
        self._sim.advance(HANDOVER)
        ready = 0.0 if after is None else self._sim.seconds_of(after)
        ends = self._queued(self._team, source.nbytes * SCALE / rate, ready)
        return lambda: self._sim.wait_until(ends)

    def submit(self, reads: Any, runs: Any, held: Any) -> Any:
        """A batch of reads that begins when a thread is free."""
        from reload_plugin.checkpoint.io.readahead import Batch

        batch = Batch(runs, reads.cache, held=held)
        batch.ends = self._queued(self._readers, batch.nbytes * SCALE / HOST_COPY)
        return batch

    def wait(self, batch: Any) -> None:
        self._sim.wait_until(batch.ends)

    def _queued(self, threads: list[float], seconds: float, ready: float = 0.0) -> float:
        number = threads.index(min(threads))
        threads[number] = max(threads[number], self._sim.wait_until(0.0), ready) + seconds
        return threads[number]


@contextlib.contextmanager
def _without_bytes(work: HostWork) -> Iterator[None]:
    """Within, time passes by the clock alone, and buffers have sizes as the models have."""
    from reload_plugin.checkpoint.io import readahead
    from reload_plugin.device import pinned, uploads

    with contextlib.ExitStack() as stack:
        put = lambda owner, **given: stack.enter_context(mock.patch.multiple(owner, **given))  # noqa: E731
        put(uploads, copy_on_host=work.copy)
        put(pinned.CopyTeam, copy=lambda _, target, source, after=None: work.begin(target, source, after))
        put(readahead.ReadAhead, submit=lambda reads, runs, held: work.submit(reads, runs, held))
        put(readahead.Batch, wait=lambda batch: work.wait(batch))
        stack.enter_context(work._sim.timing(SCALE, moves=False))
        yield


@contextlib.contextmanager
def _small_buffers() -> Iterator[None]:
    from reload_plugin.checkpoint.io import read_batches, readahead
    from reload_plugin.commit import strategies
    from reload_plugin.device import pinned, uploads

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (pinned, "SLOT"),
            (uploads, "PART"),
            (read_batches, "BATCH"),
            (read_batches, "SHARED"),
            (readahead, "SHARED"),
        ):
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name) // SCALE))
        stack.enter_context(mock.patch.object(readahead, "reader_thread_count", return_value=READERS))
        stack.enter_context(mock.patch.object(read_batches, "reader_thread_count", return_value=READERS))
        budgets = {strategy: strategy.waiting_bytes // 8 for strategy in strategies.STRATEGIES.values()}
        for strategy, budget in budgets.items():
            stack.enter_context(mock.patch.object(strategy, "waiting_bytes", budget))
        stack.enter_context(mock.patch.object(pinned, "THREADS", TEAM))
        stack.enter_context(mock.patch.object(pinned.os, "cpu_count", return_value=2 * TEAM))
        yield


# -- roads ----------------------------------------------------------------------------------------

Pairs = list[tuple[str, torch.Tensor]]
SOURCES = ("folder", "host iterator", "device iterator", "device list")


def _source(source: str, pairs: Pairs, device: torch.device) -> Any:
    if source == "device iterator":
        return ((name, tensor) for name, tensor in [(name, t.to(device)) for name, t in pairs])
    if source == "device list":
        return [(name, tensor.to(device)) for name, tensor in pairs]
    return iter(pairs)


def _floor(source: str, policy: str, nbytes: int) -> float:
    """Seconds: what the bytes need on the path that is the slowest of those they have to go."""
    crosses = not source.startswith("device") or policy == "host"
    return nbytes / (BUS if crosses else MEMORY)


@dataclass(frozen=True)
class Case:
    """One reload of a table."""

    source: str
    policy: str
    free: bool

    @property
    def memory(self) -> str:
        return "free" if self.free else "8 % free"


CASES = (
    Case("folder", "auto", True),
    Case("folder", "host", False),
    Case("folder", "streaming", False),
    Case("host iterator", "device", True),
    Case("host iterator", "host", False),
    Case("host iterator", "streaming", False),
    Case("device iterator", "device", True),
    Case("device iterator", "host", False),
    Case("device iterator", "streaming", False),
    Case("device list", "device", True),
    Case("device list", "host", False),
    Case("device list", "streaming", False),
)


class Bench:
    """One model on the device, and the weights it is reloaded with."""

    def __init__(self, sim: SimDevice, model: Any, folder: Path, rounds: int) -> None:
        self._sim, self._model, self._rounds = sim, model, rounds
        self._pairs: Pairs = [(n, torch.randn(t.shape).to(t.dtype)) for n, t in _shapes(model)]
        self.nbytes = sum(tensor.nbytes for _, tensor in self._pairs)
        self.tensors = len(self._pairs)
        self._work = HostWork(sim)
        save_file(dict(self._pairs), folder / "model.safetensors")
        text = json.dumps(model.config.model_config.hf_config.to_dict(), default=str)
        (folder / "config.json").write_text(text)
        self._folder = str(folder)

    def run(self, case: Case) -> dict[str, Any]:
        """Reload with bytes once, and compare; then so many times by the clock."""
        self._reload(case)
        self._compare()
        self._reload(case)  # the copy plan is learnt by the first reload of a kind: later ones are timed
        found = []
        for _ in range(self._rounds):
            gc.collect()
            with self._memory(case), contextlib.ExitStack() as stack:
                given = self._given(case)
                self._sim.synchronize()
                stack.enter_context(_without_bytes(self._work))
                self._work.reset()
                self._sim.reset()
                report = self._call(case, given)
                counters = self._sim.counters
            found.append(
                {
                    "seconds": counters.host_seconds,
                    "python": counters.measured_seconds,
                    "to_device": counters.bytes_to_device * SCALE,
                    "to_host": counters.bytes_to_host * SCALE,
                    "on_device": counters.bytes_on_device * SCALE,
                    "fallbacks": counters.fallbacks,
                    "launches": counters.launches,
                    "synchronizations": counters.synchronizations,
                    "peak_extra": counters.peak_allocated - self._before,
                    "old_generation": report.old_generation,
                }
            )
            del given
        middle = sorted(found, key=lambda one: one["seconds"])[len(found) // 2]
        floor = _floor(case.source, middle["old_generation"], self.nbytes * SCALE)
        seconds = [one["seconds"] for one in found]
        return middle | {
            "simulated": True,
            "source": case.source,
            "policy": case.policy,
            "memory": case.memory,
            "floor": floor,
            "ratio": statistics.median(seconds) / floor,
            "all_seconds": seconds,
        }

    @contextlib.contextmanager
    def _memory(self, case: Case) -> Iterator[None]:
        torch.accelerator.synchronize()
        self._sim.empty_cache()
        self._before = self._sim.counters.allocated
        room = self.nbytes * 4 if case.free else int(self.nbytes * SPARE)
        if case.source.startswith("device"):
            room += self.nbytes + self.nbytes // 50
            self._before += self.nbytes
        with self._sim.limit(self._sim.counters.reserved + room):
            yield

    def _given(self, case: Case) -> Any:
        return None if case.source == "folder" else _source(case.source, self._pairs, self._sim.device)

    def _reload(self, case: Case) -> None:
        with self._memory(case):
            self._call(case, self._given(case))

    def _call(self, case: Case, given: Any) -> Any:
        import reload_plugin

        weights = {"weights_path": self._folder} if case.source == "folder" else {"weights_iterator": given}
        return reload_plugin.reload_weights(self._model.model, policy=case.policy, digest=False, **weights)

    def _compare(self) -> None:
        """Raises AssertionError unless a few tensors that are served as they came have the values sent."""
        torch.accelerator.synchronize()
        served = dict(self._model.model.named_parameters())
        names = [name for name, _ in self._pairs if name in served]
        assert names
        sent = dict(self._pairs)
        for name in names:
            now = served[name].detach().cpu()[: sent[name].shape[0]]  # the vocabulary is padded
            assert torch.equal(now, sent[name]), name
            with torch.no_grad():
                served[name].zero_()  # the next reload has to write it


def _shapes(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Names and shapes (on meta), layer by layer as a trainer sends them."""
    found = [(n, torch.empty(spec.shape, dtype=spec.dtype, device="meta")) for n, spec in model.specs.items()]
    return sorted(found, key=lambda one: _place(one[0]))


def _place(name: str) -> tuple[int, int]:
    """(part of the model, layer): the embedding, the layers, what comes after them."""
    words = name.split(".")
    if "layers" in words:
        return 1, int(words[words.index("layers") + 1])
    return (0 if "embed" in name else 2), 0


def measured(names: list[str], rounds: int, only: Callable[[Case], bool] = lambda _: True) -> dict[str, Any]:
    """The table's JSON."""
    from tests.sim_device import models

    models.start()
    sim = load()
    found: dict[str, Any] = {}
    for name in names:
        shape = SHAPES[name]
        row = Row(shape.kind, shape.kind, lambda n, k: checkpoints.plain(n, k), ())
        with (
            mock.patch.dict(checkpoints.MODELS, {shape.kind: _tiny(shape)}),
            mock.patch.dict(models.ROW_OF, {shape.kind: row}),
            mock.patch.object(checkpoints, "draw", _cheap),
            _small_buffers(),
            models.built(shape.kind) as model,
            tempfile.TemporaryDirectory() as folder,
        ):
            torch.use_deterministic_algorithms(False)  # which would fill fresh memory
            bench = Bench(sim, model, Path(folder), rounds)
            rows = []
            for case in filter(only, CASES):
                rows.append(bench.run(case))
                print(_line(name, rows[-1]), flush=True)
            found[name] = {"bytes": bench.nbytes * SCALE, "tensors": bench.tensors, "reloads": rows}
        del model, bench
        gc.collect()
        sim.empty_cache()
    return {"table": "simulated", "title": TITLE, "machine": machine.machine(), "models": found}


def _cheap(name: str, spec: checkpoints.Spec, generation: str) -> torch.Tensor:
    del name, generation
    return torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")


TITLE = "Whole reloads on the simulated device (simulated seconds)"
COLUMNS = (
    "model",
    "weights come from",
    "device memory",
    "old weights",
    "seconds, simulated",
    "of these Python, measured",
    "floor",
    "÷ floor",
    "launches",
    "waits",
)


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    return [
        name,
        row["source"],
        row["memory"],
        row["old_generation"],
        f"{row['seconds']:.3f} s, simulated",
        f"{row['python']:.3f} s",
        f"{row['floor']:.4f} s",
        f"{row['ratio']:.2f}",
        f"{row['launches']:,}",
        f"{row['synchronizations']:,}",
    ]


def _line(name: str, row: dict[str, Any]) -> str:
    return " | ".join(_cells(name, row))


def markdown(report: dict[str, Any]) -> str:
    """The table as a document."""
    rows = [_cells(name, row) for name, found in report["models"].items() for row in found["reloads"]]
    return f"# {report['title']}\n\n{document.table(COLUMNS, rows)}\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot simulated seconds and floors, a row for each reload."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display
    from matplotlib import pyplot as plt

    found = [(name, row) for name, model in report["models"].items() for row in model["reloads"]]
    figure, axes = plt.subplots(figsize=(10, 0.3 * len(found) + 2), layout="constrained")
    for what, key in (("ours", "seconds"), ("floor", "floor")):
        figures, places = [row[key] for _, row in found], range(len(found))
        axes.plot(figures, places, "o", color=plot.COLOURS[what], label=plot.LABELS[what])
    texts = [f"{name}, {row['source']}, {row['memory']}, {row['old_generation']}" for name, row in found]
    axes.set_yticks(range(len(found)), texts)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("simulated seconds")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(report["title"])
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, and write JSON, Markdown and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--add", action="store_true", help="to the models that are in OUTPUT already")
    arguments = parser.parse_args()
    report = measured(arguments.models, arguments.rounds, lambda case: case.source in arguments.sources)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.add:
        before = json.loads((arguments.output / "simulated.json").read_text())
        report["models"] = before["models"] | report["models"]
    (arguments.output / "simulated.json").write_text(json.dumps(report, indent=1))
    (arguments.output / "simulated.md").write_text(markdown(report))
    draw(report, arguments.output / "simulated.png")


if __name__ == "__main__":
    main()
