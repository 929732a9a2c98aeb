"""What Accelerate's own means do with a dispatched model, and what this package does, side by side.

``python -m tests.dispatched --table`` prints the table of ``tests/README.md``.
"""

from __future__ import annotations

import atexit
import functools
import gc
import shutil
import statistics
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file, save_file
from torch import nn

from reload_plugin import keep_weights_in_module, materialize, materialized, reload_dispatched
from reload_plugin.device.host_memory import allocator, resident
from tests.dispatched import HERE, checkpoint, llama, logits, situations, split_map, values

RIGHT, ERROR, MIXTURE, WRONG = "right", "error", "error, and a mixture", "silently wrong"
EDITED = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Row:
    """A dispatched model and what is done with it."""

    tied: bool
    situation: str
    folder: Path

    def model(self) -> nn.Module:
        """The model, dispatched anew."""
        return situations(self.tied)[self.situation](Path(tempfile.mkdtemp(dir=self.folder)))

    def plain(self, seed: int = 0) -> nn.Module:
        """The same weights, not dispatched."""
        return llama(self.tied, seed)


Means = Callable[[Row, nn.Module], nn.Module]
"""Does something to a model. Returns what the result is to be equal to."""


def answers_like(model: nn.Module, expected: nn.Module) -> bool:
    """Bit for bit; False as well where the model does not run at all."""
    try:
        return torch.equal(logits(model), logits(expected))
    except Exception:  # noqa: BLE001 - of any model in any state
        return False


def outcome(row: Row, means: Means, refuses: bool) -> str:
    """How something ends.

    Args:
        row: the model.
        means: what is done.
        refuses: whether it has to be refused, with the model as it was.

    """
    model = row.model()
    runs = answers_like(model, row.plain())
    try:
        expected = means(row, model)
    except Exception:  # noqa: BLE001 - whatever it raises
        unchanged = answers_like(model, row.plain()) or not runs
        if refuses:
            return RIGHT if unchanged else MIXTURE
        return ERROR if unchanged else MIXTURE
    if refuses:
        return WRONG
    return RIGHT if answers_like(model, expected) else WRONG


# -- Accelerate's and torch's own means ------------------------------------------------------------


def own_materialize(row: Row, model: nn.Module) -> nn.Module:
    remove_hook_from_submodules(model)
    return row.plain()


def own_twenty_rounds(row: Row, model: nn.Module) -> nn.Module:
    expected = row.plain()
    for number in range(20):
        remove_hook_from_submodules(model)
        edit(model, number)
        edit(expected, number)
        folder = tempfile.mkdtemp(dir=row.folder)
        dispatch_model(model, split_map("cpu", "disk"), main_device=HERE, offload_dir=folder)
    return expected


def own_edit(row: Row, model: nn.Module) -> nn.Module:
    expected = row.plain()
    for each in (model, expected):
        edit(each, 3)
    return expected


def own_reload(row: Row, model: nn.Module) -> nn.Module:
    model.load_state_dict(row.plain(1).state_dict())
    return row.plain(1)


def own_bad(spoil: Callable[[dict[str, torch.Tensor]], None]) -> Means:
    def means(row: Row, model: nn.Module) -> nn.Module:
        tensors = row.plain(1).state_dict()
        spoil(tensors)
        model.load_state_dict(tensors)
        return row.plain(1)

    return means


def own_truncated(row: Row, model: nn.Module) -> nn.Module:
    model.load_state_dict(load_file(truncated(row)), strict=not row.tied)
    return row.plain(1)


def own_save(row: Row, model: nn.Module) -> nn.Module:
    model.save_pretrained(row.folder / "saved", max_shard_size="10KB")
    loaded = type(model).from_pretrained(row.folder / "saved").eval()
    if not answers_like(loaded, row.plain()):
        return row.plain(1)
    return row.plain()


# -- reload_plugin ---------------------------------------------------------------------------------


def our_materialize(row: Row, model: nn.Module) -> nn.Module:
    materialize(model)
    return row.plain()


def our_twenty_rounds(row: Row, model: nn.Module) -> nn.Module:
    expected = row.plain()
    for number in range(20):
        with materialized(model):
            edit(model, number)
        edit(expected, number)
    materialize(model)
    return expected


def our_edit(row: Row, model: nn.Module) -> nn.Module:
    keep_weights_in_module(model, disk=True)
    return own_edit(row, model)


def our_reload(row: Row, model: nn.Module) -> nn.Module:
    reload_dispatched(model, checkpoint(row.tied, 1))
    materialize(model)
    return row.plain(1)


def our_bad(spoil: Callable[[dict[str, torch.Tensor]], None]) -> Means:
    def means(row: Row, model: nn.Module) -> nn.Module:
        tensors = load_file(Path(checkpoint(row.tied, 1)) / "model.safetensors")
        spoil(tensors)
        reload_dispatched(model, weights_iterator=tensors.items())
        return row.plain(1)

    return means


def our_truncated(row: Row, model: nn.Module) -> nn.Module:
    reload_dispatched(model, truncated(row))
    return row.plain(1)


def our_save(row: Row, model: nn.Module) -> nn.Module:
    with materialized(model):
        model.save_pretrained(row.folder / "saved", max_shard_size="10KB")
    loaded = type(model).from_pretrained(row.folder / "saved").eval()
    assert answers_like(loaded, row.plain())
    materialize(model)
    return row.plain()


def edit(model: nn.Module, number: int) -> None:
    """A change in place, as a merge of an adapter makes it."""
    with torch.no_grad():
        values(model)[EDITED].add_(0.01 * number)


def truncated(row: Row) -> Path:
    """A safetensors file without its end."""
    path = row.folder / "truncated.safetensors"
    path.write_bytes((Path(checkpoint(row.tied, 1)) / "model.safetensors").read_bytes()[:-1000])
    return path


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EDITED] = torch.zeros(47, 32)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[EDITED]


COLUMNS: dict[str, tuple[Means, Means, bool]] = {
    "materialize": (own_materialize, our_materialize, False),
    "20 rounds": (own_twenty_rounds, our_twenty_rounds, False),
    "edit in place": (own_edit, our_edit, False),
    "reload": (own_reload, our_reload, False),
    "wrong shape": (own_bad(wrong_shape), our_bad(wrong_shape), True),
    "missing name": (own_bad(missing), our_bad(missing), True),
    "truncated source": (own_truncated, our_truncated, True),
    "save": (own_save, our_save, False),
}
"""Column -> Accelerate's own means, ours, and whether it has to be refused."""


def outcomes(tied: bool, situation: str) -> Iterator[tuple[str, str, str]]:
    """Column, how Accelerate's own ends, how ours ends."""
    for column, (own, ours, refuses) in COLUMNS.items():
        found = []
        for means in (own, ours):
            with tempfile.TemporaryDirectory() as folder:
                found.append(outcome(Row(tied, situation, Path(folder)), means, refuses))
        yield column, found[0], found[1]


def main(arguments: list[str]) -> None:
    """Print the tables that are asked for: ``--table``, ``--memory``."""
    if "--table" in arguments:
        print_outcomes()
    if "--memory" in arguments:
        print_memory()


def print_outcomes() -> None:
    """The table of outcomes, as Markdown."""
    print("| model dispatched by |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    own_total, our_total = Counter[str](), Counter[str]()
    for tied in (False, True):
        for name in situations(tied):
            cells = []
            for _, own, ours in outcomes(tied, name):
                own_total[own] += 1
                our_total[ours] += 1
                cells.append(f"{own} / {ours}")
            print(f"| {name}{', tied' if tied else ''} |", " | ".join(cells), "|", flush=True)
    for title, total in (("Accelerate's own", own_total), ("this package", our_total)):
        print(f"\n{title}: {', '.join(f'{count} {kind}' for kind, count in total.most_common())}.")


# -- memory ----------------------------------------------------------------------------------------


def print_memory() -> None:
    """Resident memory over fifty rounds, and at the peak of one, of a model of 260 MB."""
    for number in (0, 1):
        written(number)
    print("| fifty rounds of | growth, MiB | peak above the result, MiB | largest tensor, MiB |")
    print("|---|---|---|---|")
    for name in ROUNDS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {name} | {' | '.join(_measured(name, Path(folder)))} |", flush=True)


def large() -> nn.Module:
    """Blocks of 16 MiB."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))


def materialize_rounds(model: nn.Module, number: int) -> None:
    with materialized(model), torch.no_grad():
        model[number % 16].weight.add_(1)


def forward_rounds(model: nn.Module, number: int) -> None:
    with torch.no_grad():
        model(torch.full((1, 2048), float(number)))


def reload_rounds(model: nn.Module, number: int) -> None:
    pairs = ((f"{block}.weight", torch.full((2048, 2048), float(number))) for block in range(16))
    reload_dispatched(model, weights_iterator=pairs)


def folder_rounds(model: nn.Module, number: int) -> None:
    reload_dispatched(model, written(number % 2))


@functools.cache
def written(number: int) -> str:
    """A checkpoint of ``large``, which stays until the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    save_file(
        {f"{block}.weight": torch.full((2048, 2048), float(number)) for block in range(16)},
        folder / "model.safetensors",
    )
    return str(folder)


ROUNDS: dict[str, Callable[[nn.Module, int], None]] = {
    "materialized": materialize_rounds,
    "forward passes, Accelerate's hooks": forward_rounds,
    "forward passes, kept in module": forward_rounds,
    "reload_dispatched, from a folder": folder_rounds,
    "reload_dispatched, from an iterator, its tensors too": reload_rounds,
}


def _measured(name: str, folder: Path) -> list[str]:
    model = dispatch_model(
        large(),
        {str(block): "cpu" if block % 2 else "disk" for block in range(16)},
        main_device=HERE,
        offload_dir=str(folder),
    )
    if "kept" in name:
        keep_weights_in_module(model)
    sizes, peaks = [], []
    for number in range(50):
        release()
        before = resident()
        with Peak() as peak:
            ROUNDS[name](model, number)
        gc.collect()
        release()
        sizes.append(resident())
        peaks.append(peak.value - before)
    extra = (8 << 24) if name == "materialized" else 0  # what is on disk comes into memory
    steady = statistics.median(sizes[5:15]), statistics.median(sizes[-10:])  # after what is made once
    return [
        f"{(steady[1] - steady[0]) / 2**20:+.1f}",
        f"{(max(peaks[5:]) - extra) / 2**20:.0f}",
        f"{16}",
    ]


def release() -> None:
    """Give unused heap back, which would hide what grows."""
    found = allocator()
    if found is not None:
        found.release(0)


class Peak:
    """The largest resident size of this process within a block, by sampling every millisecond."""

    def __enter__(self) -> Peak:
        self.value = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.001):
            self.value = max(self.value, resident())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
