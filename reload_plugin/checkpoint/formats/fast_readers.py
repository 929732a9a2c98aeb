"""The libraries behind vLLM's fast loaders, each as an iterator over safetensors files.

They are called here and not through vLLM, whose functions read ahead without a limit and, where there are
several ranks, let them read for one another: a rank that fails would keep the others waiting. Here every rank
reads for itself, and what a library holds at one time is bounded as far as it lets itself be bounded.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch

AHEAD = 32 << 20
"""Bytes of files that a library may hold beside the tensor that it hands out, or those of one tensor."""

Pairs = Generator[tuple[str, torch.Tensor], None, None]
Reader = Callable[[Sequence[str], torch.device, int], Pairs]
"""(files, device of the model, bytes of the largest tensor) -> (name, tensor), in the order of the library. A
tensor is good until the next one is asked for. Raises ImportError without the library, or what that raises.
"""

_LIMIT = "RUNAI_STREAMER_MEMORY_LIMIT"


def runai(files: Sequence[str], device: torch.device, largest: int) -> Pairs:
    """Run:ai Model Streamer, to host memory. Its buffers hold ``AHEAD`` bytes, or what its own environment
    variable says; unbounded they would take up to 40 GB.
    """
    del device  # vLLM streams to the host as well
    streamer = importlib.import_module("runai_model_streamer").SafetensorsStreamer
    with streamer() as streaming:
        with _environment(_LIMIT, str(max(AHEAD, largest))):
            streaming.stream_files(list(files), device="cpu", is_distributed=False)
        yield from streaming.get_tensors()


def fastsafetensors(files: Sequence[str], device: torch.device, largest: int) -> Pairs:
    """Chunks of files, to the device of the model: one of ``AHEAD`` bytes at a time, and a bounce buffer of
    16 MiB. On a GPU without GPUDirect Storage they come through host memory, as vLLM's loader does it.
    """
    parallel = importlib.import_module("fastsafetensors.parallel_loader").ParallelLoader
    bounded: dict[str, Any] = {"queue_size": -1, "max_batch_bytes": max(AHEAD, largest)}
    alone: dict[str, Any] = {"pg": None, "all_local": True, "use_tqdm_on_load": False}
    loader = parallel(hf_weights_files=list(files), device=str(device), nogds=True, **bounded, **alone)
    with contextlib.closing(loader):
        yield from loader.iterate_weights()


def instanttensor(files: Sequence[str], device: torch.device, largest: int) -> Pairs:
    """To the memory of an NVIDIA GPU only. The size of its buffers on host and GPU is its own choice."""
    del largest
    if device.type != "cuda":
        raise ValueError(f"it reads to NVIDIA GPUs only, and the model is on {device}")
    opened = importlib.import_module("instanttensor").safe_open
    number = torch.accelerator.current_device_index() if device.index is None else device.index
    with opened(list(files), framework="pt", device=number, process_group=None, copy=True) as file:
        yield from file.tensors()


READERS: Mapping[str, Reader] = {
    "runai_streamer": runai,
    "fastsafetensors": fastsafetensors,
    "instanttensor": instanttensor,
}
"""vLLM's ``load_format`` -> how its library is read."""


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable that the user has not set, for as long as this lasts."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
