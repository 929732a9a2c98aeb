"""Where the weights of a model can be: in memory, on the CPU or on disk, by whichever library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _loaded(folder: Path, **options: Any) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])
    return model.from_pretrained(folder, **options).eval()


def in_memory(folder: Path, scratch: Path) -> Any:
    """Not offloaded."""
    del scratch
    return _loaded(folder)


def full_disk(folder: Path, scratch: Path) -> Any:
    """Every weight on disk, by ``device_map``."""
    return _loaded(folder, device_map={"": "disk"}, offload_folder=scratch)


def cpu_and_disk(folder: Path, scratch: Path) -> Any:
    """Every second block on disk, the rest in memory, by ``device_map``."""
    return _loaded(folder, device_map=_alternating(folder), offload_folder=scratch)


def with_buffers(folder: Path, scratch: Path) -> Any:
    """As ``full_disk``, buffers too."""
    return _loaded(folder, device_map={"": "disk"}, offload_folder=scratch, offload_buffers=True)


def by_cpu_offload(folder: Path, scratch: Path) -> Any:
    """Accelerate's ``cpu_offload``."""
    from accelerate import cpu_offload

    del scratch
    return cpu_offload(_loaded(folder), execution_device=torch.device("cpu"))


def by_disk_offload(folder: Path, scratch: Path) -> Any:
    """Accelerate's ``disk_offload``."""
    from accelerate import disk_offload

    return disk_offload(_loaded(folder), scratch, execution_device=torch.device("cpu"), offload_buffers=True)


def by_whole_blocks(folder: Path, scratch: Path) -> Any:
    """Accelerate's ``disk_offload`` with one hook that holds a whole block."""
    from accelerate import disk_offload

    model = _loaded(folder)
    blocks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    classes = [type(block[0]).__name__ for block in blocks]
    return disk_offload(model, scratch, execution_device=torch.device("cpu"), preload_module_classes=classes)


def in_cache_on_cpu(folder: Path, scratch: Path) -> Any:
    """compressed-tensors' cache, on the CPU."""
    return _cached(_loaded(folder), "cpu")


def in_cache_on_disk(folder: Path, scratch: Path) -> Any:
    """compressed-tensors' cache, on disk."""
    scratch.mkdir(parents=True, exist_ok=True)
    return _cached(_loaded(folder), "disk", offload_dir=str(scratch))


def _cached(model: Any, device: str, **options: Any) -> Any:
    from compressed_tensors.offload import offload_module

    for module in model.modules():
        if module._parameters or module._buffers:
            offload_module(module, "cpu", device, **options)
    return model


def _alternating(folder: Path) -> dict[str, str]:
    """Blocks on disk and on the CPU in turns, everything beside the blocks on the CPU."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [f"{name}.{index}" for name in outer for index in range(len(model.get_submodule(name)))]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in model.state_dict())
    beside = [name for name in owners if not any(f"{name}.".startswith(f"{block}.") for block in blocks)]
    return dict.fromkeys(beside, "cpu") | {b: ("disk", "cpu")[i % 2] for i, b in enumerate(blocks)}


PLACEMENTS: dict[str, Callable[[Path, Path], Any]] = {
    "in memory": in_memory,
    "full disk": full_disk,
    "CPU and disk": cpu_and_disk,
    "full disk, buffers too": with_buffers,
    "cpu_offload()": by_cpu_offload,
    "disk_offload()": by_disk_offload,
    "disk_offload(), whole blocks": by_whole_blocks,
    "compressed-tensors, CPU": in_cache_on_cpu,
    "compressed-tensors, disk": in_cache_on_disk,
}
"""Name -> loads the model of a folder; the second argument is a folder for offloaded weights."""
