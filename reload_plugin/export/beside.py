"""Files beside the weights of an export: config, tokenizer, code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".distcp")
_INDEX = ".index.json"
CONFIG = "config.json"


def write_beside(folder: Path, origins: list[str], config: Mapping[str, Any] | None) -> None:
    """Copy what an engine needs to start beside the weights.

    Args:
        folder: the new folder.
        origins: folders, or files in them, to copy from: the first that has a config.json.
        config: config.json as the engine started with it, where no origin has one.

    Raises:
        OSError: a file cannot be copied.

    """
    origin = next(_with_config(origins), None)
    for file in sorted(origin.iterdir()) if origin is not None else ():
        if file.is_file() and _goes_along(file):
            shutil.copyfile(file, folder / file.name)
    if config is not None and not (folder / CONFIG).exists():
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_config(origins: list[str]) -> Iterator[Path]:
    for name in origins:
        place = Path(name)
        folder = place if place.is_dir() else place.parent
        for found in (folder, folder / "huggingface"):
            if (found / CONFIG).is_file():
                yield found


def _goes_along(file: Path) -> bool:
    hidden = file.name.startswith(".")
    return not (hidden or file.suffix in _WEIGHTS or file.name.endswith(_INDEX))
