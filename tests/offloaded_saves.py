"""Saves of offloaded models: what is written, and what transformers' own ``save_pretrained`` writes.

``python -m tests.offloaded_saves --table`` makes the table of tests/README.md; ``--memory`` saves a model of
2 GB from disk and says how much memory that took.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from reload_plugin.export.offloaded import save_offloaded
from reload_plugin.export.outputs import plan_export
from reload_plugin.plan.source import TensorInfo
from tests.export.folders import tensors_of
from tests.export.placements import PLACEMENTS
from tests.export.small_models import FAMILIES, Family

FAST = Path("/dev/shm")
"""A file system in memory, where flushing costs nothing."""
Saver = Callable[[Any, Path, int], object]


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, in memory where there is such a file system."""
    return tempfile.TemporaryDirectory(dir=FAST if FAST.is_dir() else None)


def quiet() -> None:
    """No warnings and bars of transformers."""
    import transformers

    warnings.filterwarnings("ignore", module="transformers|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("accelerate.big_modeling", "accelerate.utils.modeling"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_original(family: Family, folder: Path) -> dict[str, torch.Tensor]:
    """Write a family's checkpoint, as transformers writes it from memory, and return its tensors.

    Loaded and saved once more, so that every dtype is the one that transformers loads it in. Where
    transformers writes a model wrong from memory too (experts of inner size 1), the shapes are put right.
    """
    model = family.make()
    model.save_pretrained(folder)
    if family.squeezed:
        _unsqueeze(folder, family.squeezed)
    model = PLACEMENTS["in memory"](folder, folder)
    model.save_pretrained(folder)
    if family.squeezed:
        _unsqueeze(folder, family.squeezed)
    return tensors_of(folder)


def _unsqueeze(folder: Path, dims: dict[str, int]) -> None:
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    found = tensors_of(folder)
    for name, tensor in found.items():
        for suffix, dim in dims.items():
            if name.endswith(suffix) and tensor.ndim == 1:
                found[name] = tensor.unsqueeze(dim)
    save_file(found, file, metadata={"format": "pt"})


def sizes_of(original: dict[str, torch.Tensor], count: int | None = None) -> list[int]:
    """Sizes of files from one tensor a file to one file: those at which the number of files changes, or
    ``count`` of them, evenly spread.
    """
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in original.items()]
    total = sum(tensor.nbytes for tensor in original.values())
    steps = sorted({1, *(round(1.25**power) for power in range(100) if 1.25**power < total), total})
    from reload_plugin.export.outputs import OutputGroup

    groups = [OutputGroup(tuple(infos), dict)]
    by_files: dict[int, int] = {}
    for size in steps:
        by_files[len(plan_export(groups, size).files)] = size
    sizes = sorted(by_files.values())
    sizes[0] = 1
    if count is not None and len(sizes) > count:
        sizes = [sizes[round(index * (len(sizes) - 1) / (count - 1))] for index in range(count)]
    return sizes


def ours(model: Any, folder: Path, size: int) -> object:
    """Save with this package."""
    return save_offloaded(model, folder, max_shard_size=size)


def their_own(model: Any, folder: Path, size: int) -> object:
    """Save with transformers' own ``save_pretrained``."""
    return model.save_pretrained(folder, max_shard_size=size)


def expected(original: dict[str, torch.Tensor], family: Family, placement: str) -> dict[str, torch.Tensor]:
    """What a save of a placed model has to hold: the original, in the dtypes the model was loaded in."""
    if family.cast_buffers and placement == "full disk, buffers too":
        return {name: tensor.bfloat16() for name, tensor in original.items()}
    return original


def why_wrong(folder: Path, original: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with a save; None where each tensor is the original's and in exactly one file."""
    try:
        found = tensors_of(folder)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it
        return next(iter(str(error).splitlines()), type(error).__name__)
    if found.keys() != original.keys():
        return f"{len(found.keys() ^ original.keys())} names differ"
    for name, tensor in original.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            own = f"{list(found[name].shape)} {found[name].dtype}"
            return f"{name} is {own}, not {list(tensor.shape)} {tensor.dtype}"
        if not torch.equal(found[name], tensor):
            return f"{name} has other values"
    return None


def outcome(save: Saver, model: Any, size: int, original: dict[str, torch.Tensor]) -> str:
    """One save, judged: ``right``, ``wrong`` (it said nothing) or ``error``."""
    with scratch_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            save(model, Path(folder, "out"), size)
        except Exception:  # noqa: BLE001 - whatever it raises is an error
            return "error"
        return "wrong" if why_wrong(Path(folder, "out"), original) else "right"


def _cell(outcomes: Counter[str]) -> str:
    tried = outcomes.total()
    if outcomes["right"] == tried:
        return f"{tried}/{tried}"
    rest = ", ".join(f"{outcomes[kind]} {kind}" for kind in ("wrong", "error") if outcomes[kind])
    return f"**{outcomes['right']}/{tried}** ({rest})"


def table(count: int | None, families: Sequence[str] = ()) -> str:
    """Prints a row for each family and placement, a column for each saver; returns a row for each family.

    Args:
        count: sizes of files for each row; None for all at which the number of files changes.
        families: names of those that are asked for; all where there is none.

    """
    import transformers

    savers = f"`save_pretrained` {transformers.__version__} | `save_offloaded` |"
    print(f"| model | undone | weights are | {savers}\n|---|---|---|---|---|")
    lines = [f"| model | undone | {savers}", "|---|---|---|---|"]
    total = {saver: Counter[str]() for saver in (their_own, ours)}
    for family in (family for family in FAMILIES if not families or family.name in families):
        with scratch_folder() as folder:
            original = make_original(family, Path(folder, "original"))
            of_family = {saver: Counter[str]() for saver in total}
            for name, place in PLACEMENTS.items():
                cells = []
                for saver in (their_own, ours):
                    model = place(Path(folder, "original"), Path(folder, f"{name} {saver.__name__}"))
                    right = expected(original, family, name)
                    found = Counter(outcome(saver, model, size, right) for size in sizes_of(original, count))
                    of_family[saver] += found
                    cells.append(_cell(found))
                print(f"| {family.name} | {family.conversion} | {name} | {' | '.join(cells)} |", flush=True)
        for saver, found in of_family.items():
            total[saver] += found
        sums = " | ".join(_cell(found) for found in of_family.values())
        lines.append(f"| {family.name} | {family.conversion} | {sums} |")
    lines.append(f"| all | | {' | '.join(_cell(found) for found in total.values())} |")
    return "\n".join(lines)


def accidents() -> str:
    """A row for each accident, a column for each saver."""
    import transformers

    from tests.offloaded_accidents import ACCIDENTS

    lines = [
        f"| accident | `save_pretrained` {transformers.__version__} | `save_offloaded` |",
        "|---|---|---|",
    ]
    family = next(family for family in FAMILIES if family.name == "mixtral")
    for name, happens in ACCIDENTS.items():
        cells = []
        for saver in (their_own, ours):
            with scratch_folder() as folder:
                original = make_original(family, Path(folder, "original"))
                outcomes = happens(saver, Path(folder), original)
                right = f"{sum(outcomes)}/{len(outcomes)}"
                cells.append(right if all(outcomes) else f"**{right}**")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


# -- memory ---------------------------------------------------------------------------------------

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def make_large(folder: Path) -> int:
    """Write a Llama of 2 GB in bfloat16, layer by layer; returns its bytes."""
    import transformers

    from reload_plugin.export.outputs import OutputGroup
    from reload_plugin.export.writer import write_export

    config = transformers.LlamaConfig(**LARGE, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    infos = [TensorInfo(n, tuple(t.shape), torch.bfloat16) for n, t in model.state_dict().items()]
    plan = plan_export([OutputGroup((info,), functools.partial(_filled, info)) for info in infos], "1GB")
    write_export(folder, plan, beside=config.save_pretrained)
    return plan.nbytes


def _filled(info: TensorInfo) -> dict[str, torch.Tensor]:
    return {info.name: torch.randn(info.shape, dtype=info.dtype)}


def resident(what: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def measure_memory() -> str:
    """Save a model of 2 GB that is all on disk; how much resident memory that took."""
    with tempfile.TemporaryDirectory() as folder:
        nbytes = make_large(Path(folder, "large"))
        model = PLACEMENTS["full disk"](Path(folder, "large"), Path(folder, "scratch"))
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        report = save_offloaded(model, Path(folder, "out"))
        peak = resident("VmHWM")
        return json.dumps(
            {
                "model": f"{nbytes / 1e9:.2f} GB",
                "resident before": f"{before / 2**20:.0f} MiB",
                "resident at the peak": f"{peak / 2**20:.0f} MiB",
                "more": f"{(peak - before) / 2**20:.0f} MiB",
                "largest group": f"{report.peak_bytes / 2**20:.0f} MiB",
                "seconds": f"{report.seconds:.1f}",
            }
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="all families, placements and sizes of files")
    parser.add_argument("--sizes", type=int, help="so many sizes of files for each row, not all")
    parser.add_argument("--family", action="append", default=[], help="only these rows; no accidents")
    parser.add_argument("--memory", action="store_true", help="a model of 2 GB")
    chosen = parser.parse_args()
    quiet()
    if chosen.table:
        if not chosen.family:
            print(accidents())
        print(table(chosen.sizes, chosen.family))
    if chosen.memory:
        print(measure_memory())


if __name__ == "__main__":
    main()
