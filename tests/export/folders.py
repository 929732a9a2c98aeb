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
