"""What lies in a folder of weights, read with the libraries that other people use."""

import json
from pathlib import Path

import torch
from safetensors import safe_open


def files_of(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden files included."""
    return sorted(entry.name for entry in folder.iterdir())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of a save; each name is in exactly one file, and the index says which."""
    found: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - no mapping
                assert name not in found, f"{name} is in {where[name]} and {file.name}"
                found[name], where[name] = opened.get_tensor(name), file.name
    index = folder / "model.safetensors.index.json"
    several = len(list(folder.glob("*.safetensors"))) > 1
    assert index.exists() == several
    if several:
        listed = json.loads(index.read_text())
        assert listed["weight_map"] == where
        assert listed["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


def as_hugging_face_loads(folder: Path) -> dict[str, torch.Tensor]:
    """What ``from_pretrained`` reads: one file by its name, else all that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return _read([single])
    if index.exists():
        listed = json.loads(index.read_text())["weight_map"]
        found = _read([folder / name for name in sorted(set(listed.values()))])
        return {name: found[name] for name in listed}
    return dict(torch.load(folder / "pytorch_model.bin"))


def as_vllm_loads(folder: Path) -> dict[str, torch.Tensor]:
    """What vLLM reads: every safetensors file that ``vllm_files`` leaves."""
    files = vllm_files(folder)
    return _read(files) if files else dict(torch.load(folder / "pytorch_model.bin"))


def vllm_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder that vLLM reads: those that its index names, all without an index.

    As vLLM's ``filter_duplicate_safetensors_files`` has it (a test holds the two against each other), which
    takes long to import.
    """
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
    return [file for file in sorted(folder.glob("*.safetensors")) if named is None or file.name in named]


def _read(files: list[Path]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                assert name not in found, f"{name} comes twice"
                found[name] = opened.get_tensor(name)
    assert found, "nothing is loaded"
    return found
