"""Peak extra memory of a reload from each format on disk: one engine, all formats in turn.

The engine lives in this process; checkpoints are written in other processes, so that only the reload moves
the kernel's high-water mark of resident memory. Each format is written, reloaded twice with the first
checkpoint in between, and deleted. Every answer is compared with that of a cold start on safetensors.
"""

import argparse
import base64
import json
import pickle
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
from machine import MIB, Peak, machine, warm_up
from rich.console import Console
from tqdm import tqdm
from trials import ask_cold, engine, start

SIZE = {"layers": 60, "hidden": 1024, "vocabulary": 32768, "experts": 0, "inner": 3072}
"""663 tensors, 2.0 GB; the largest layer has 64 MiB."""
BEYOND = 128 * MIB
"""Bytes that a reload may take beside the largest layer."""
RANKS = 2
TURNS = 2


# -- writing: each format by the library that writes it -------------------------------------------


def weights(folder: str) -> dict[str, Any]:
    """The checkpoint that every format holds."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def in_safetensors(model: str, folder: Path) -> None:
    """One file."""
    shutil.copy(Path(model) / "model.safetensors", folder)


def in_torch(model: str, folder: Path) -> None:
    """A state dict in a dict with other entries."""
    import torch

    torch.save({"model": weights(model), "step": 1}, folder / "checkpoint.pt")


def in_torch_transposed(model: str, folder: Path) -> None:
    """Matrices stored transposed."""
    import torch

    turned = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in weights(model).items()}
    torch.save(turned, folder / "model.pt")


def in_old_torch(model: str, folder: Path) -> None:
    """The format of torch before 1.6."""
    import torch

    torch.save(weights(model), folder / "model.pt", _use_new_zipfile_serialization=False)


def in_olmo(model: str, folder: Path) -> None:
    """Names encoded as OLMo does: base64 of the pickle of (path, is pickled)."""
    from safetensors.torch import save_file

    named = {
        base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode(): tensor
        for name, tensor in weights(model).items()
    }
    save_file(named, folder / "model.safetensors")


def in_dcp(model: str, folder: Path) -> None:
    """torch.distributed.checkpoint, written by two ranks."""
    _by_ranks("dcp", model, folder)


def in_dcp_safetensors(model: str, folder: Path) -> None:
    """torch.distributed.checkpoint with shards in safetensors."""
    _by_ranks("dcp-safetensors", model, folder)


def in_fsdp(model: str, folder: Path) -> None:
    """One file for each rank, sharded by rows."""
    _by_ranks("fsdp", model, folder)


def in_fsdp_columns(model: str, folder: Path) -> None:
    """One file for each rank, sharded by columns."""
    _by_ranks("fsdp, columns", model, folder)


def _by_ranks(kind: str, model: str, folder: Path) -> None:
    import torch

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{found.getsockname()[1]}"
    torch.multiprocessing.start_processes(
        _rank, (address, kind, model, str(folder)), nprocs=RANKS, start_method="spawn"
    )


def _rank(rank: int, address: str, kind: str, model: str, folder: str) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    state = {}
    for name, tensor in weights(model).items():
        dim = tensor.ndim - 1 if kind == "fsdp, columns" else 0
        part = tensor.chunk(RANKS, dim)[rank].clone()
        state[name] = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)
    if kind == "dcp":
        dcp.save({"model": state}, checkpoint_id=folder)
    elif kind == "dcp-safetensors":
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True))
    else:
        torch.save(state, f"{folder}/model_world_size_{RANKS}_rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


FORMATS: dict[str, Callable[[str, Path], None]] = {
    "safetensors": in_safetensors,
    "torch": in_torch,
    "torch, transposed": in_torch_transposed,
    "torch before 1.6": in_old_torch,
    "fsdp": in_fsdp,
    "fsdp, columns": in_fsdp_columns,
    "dcp": in_dcp,
    "dcp-safetensors": in_dcp_safetensors,
    "olmo": in_olmo,
}


def write_format(name: str, model: str, folder: str) -> None:
    """Write the checkpoint in ``model`` as one format."""
    Path(folder).mkdir()
    FORMATS[name](model, Path(folder))


def write_model(folder: str, size: dict[str, int], seed: int) -> None:
    """Write one random checkpoint."""
    models.write(Path(folder), models.Model("", size), seed)


def work(task: str, **arguments: Any) -> Any:
    """What a process that `in_child` started does."""
    return {"cold": ask_cold, "write": write_format, "model": write_model}[task](**arguments)


# -- measuring ------------------------------------------------------------------------------------


def child(task: str, **arguments: Any) -> Any:
    """Run a task in a process of its own."""
    return engine.in_child(__file__, {"task": task, **arguments}, plugin=False)


def reload(llm: Any, folder: str) -> dict[str, Any]:
    """One reload: peak extra resident memory (bytes), seconds, and the answer afterwards."""
    warm_up(folder)
    with Peak() as peak:
        started = time.perf_counter()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        seconds = time.perf_counter() - started
    answer = json.loads(json.dumps(engine.answer(llm)))  # as it comes from another process
    return {"extra": peak.extra, "seconds": seconds, "answer": answer}


def measure(names: list[str], size: dict[str, int], root: Path) -> dict[str, Any]:
    """Reload from every format, with the first checkpoint in between.

    Raises:
        SystemExit: an answer differs from that of a cold start.

    """
    folders = {side: str(root / side) for side in "AB"}
    for side, seed in (("A", 1), ("B", 2)):
        child("model", folder=folders[side], size=size, seed=seed)
    truth = child("cold", folders=folders, options={})
    rows = []
    engine.prepare(plugin=True)
    with start(folders["A"], {}) as llm:
        engine.answer(llm)
        for name in tqdm(names, unit="format", file=sys.stdout):
            folder = str(root / "format")
            child("write", name=name, model=folders["B"], folder=folder)
            runs = []
            for _ in range(TURNS):
                runs.append(reload(llm, folder))
                back = reload(llm, folders["A"])
                if runs[-1].pop("answer") != truth["B"] or back.pop("answer") != truth["A"]:
                    raise SystemExit(f"{name}: the answer differs from that of a cold start")
                runs[-1]["back"] = back
            rows.append({"format": name, "runs": runs})
            shutil.rmtree(folder)
    return {"bytes": models.bytes_of(folders["B"]), "largest": models.largest_layer(size), "rows": rows}


def peak_of(row: dict[str, Any]) -> int:
    """The most extra memory (bytes) of the reloads from a format and of those that followed them."""
    return max(max(run["extra"], run["back"]["extra"]) for run in row["runs"])


def markdown(report: dict[str, Any]) -> str:
    """One row for each format."""
    limit = report["largest"] + BEYOND
    lines = ["| format | peak extra memory | promised at most | seconds |", "|---|---|---|---|"]
    for row in report["rows"]:
        seconds = min(run["seconds"] for run in row["runs"])
        peak = max(run["extra"] for run in row["runs"])
        lines.append(f"| {row['format']} | {peak / MIB:,.0f} MiB | {limit / MIB:,.0f} MiB | {seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, write JSON and Markdown, print the table."""
    parser = argparse.ArgumentParser(description="resident memory of a reload from each format")
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this one; may be repeated")
    for name in models.SIZES:
        parser.add_argument(f"--{name}", type=int, help="size of the model, if not 2 GB")
    parser.add_argument("--folder", type=Path, help="where to write; three times the model")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = parser.parse_args()
    chosen = {name: getattr(arguments, name) for name in models.SIZES}
    size = SIZE | {name: value for name, value in chosen.items() if value is not None and name != "experts"}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        measured = measure(arguments.format or list(FORMATS), size, Path(root))
    report = {"machine": machine(), "size": size} | measured
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "formats.json").write_text(json.dumps(report, indent=1))
    (arguments.output / "formats.md").write_text(markdown(report) + "\n")
    Console(width=None if sys.stdout.isatty() else 240).print(markdown(report), markup=False)
    over = [row["format"] for row in report["rows"] if peak_of(row) > report["largest"] + BEYOND]
    if over:
        raise SystemExit(f"more memory than promised: {', '.join(over)}")


if __name__ == "__main__":
    if not engine.as_child(work):
        main()
