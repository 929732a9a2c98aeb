"""vLLM's models and quantization methods on the simulated device, and roads by which weights reach them."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from safetensors.torch import save_file

from tests.engine.gpu_methods import checkpoints, walker
from tests.engine.gpu_methods.rows import ROWS
from tests.sim_device.loading import load

if TYPE_CHECKING:  # imports vLLM, which only the process with the device needs
    from tests.engine.gpu_methods import driver

DEVICE = "sim"
NAMES = tuple(row.name for row in ROWS)
ROW_OF = {row.name: row for row in ROWS}

DENSE, PACKED, EXPERTS, ONLINE = (
    "fp8 kv cache bf16 weights",
    "fp8 marlin",
    "bf16 experts triton",
    "online fp8 tensor",
)
"""Weights that processing leaves as they are, packed ones, experts, and ones that are quantized while they
are loaded."""
FEW = (DENSE, PACKED, EXPERTS, ONLINE)

GUARD = "model.load_weights"
"""What stands in for ``load_weights`` of a served model remembers the last push."""

Weights = list[tuple[str, torch.Tensor]]


def start() -> None:
    """Called once in the process, before the first model is built."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled code asks the CUDA build of torch for streams
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(1)
    from tests.engine.gpu_methods import driver

    driver.start_process()
    load()
    from reload_plugin.vllm_hooks import plugin

    plugin.register()


@contextmanager
def built(
    name: str, generation: str = "A", layers: int | None = None, pool: str = ""
) -> Iterator[driver.Built]:
    """A model of a row on the device, started on a generation of its weights; with so many layers.

    ``pool``: what the start allocates belongs to it, as with sleep mode.
    """
    from vllm.config import set_current_vllm_config

    from tests.engine.gpu_methods import driver

    row = ROW_OF[name]
    with driver.machine(row, DEVICE), _with_layers(row.model, layers):
        with load().pool(pool):
            model = driver.build(row, generation, DEVICE)
        with set_current_vllm_config(model.config):
            yield model


@contextmanager
def _with_layers(kind: str, layers: int | None) -> Iterator[None]:
    tiny = checkpoints.MODELS[kind]
    if layers is None:
        yield
        return
    deep = dataclasses.replace(tiny, config=tiny.config | {"num_hidden_layers": layers})
    with mock.patch.dict(checkpoints.MODELS, {kind: deep}):
        yield


@functools.cache
def cold(name: str, generation: str, layers: int | None = None) -> walker.Picture:
    """What a cold start holds, in host memory."""
    with built(name, generation, layers) as model:
        picture = on_host(walker.take_picture(model.model))
    del model
    gc.collect()  # models are cycles, and hold memory of the device
    return picture


def on_host(picture: walker.Picture) -> walker.Picture:
    """The states alone, with contents in host memory."""
    states = {
        path: dataclasses.replace(state, content=state.content.cpu())
        if isinstance(state, walker.TensorState) and state.content is not None
        else state
        for path, state in picture.states.items()
    }
    return walker.Picture(states)


def weights(model: driver.Built, generation: str) -> Weights:
    """In host memory."""
    return list(checkpoints.weights(model.specs, generation))


def written(model: driver.Built, generation: str, folder: Path) -> str:
    """A checkpoint folder with these weights."""
    save_file(
        {name: tensor.contiguous() for name, tensor in weights(model, generation)},
        folder / "model.safetensors",
    )
    text = json.dumps(model.config.model_config.hf_config.to_dict(), default=str)
    (folder / "config.json").write_text(text)
    return str(folder)


# -- roads ----------------------------------------------------------------------------------------


def from_folder(model: driver.Built, generation: str) -> None:
    import reload_plugin

    with tempfile.TemporaryDirectory() as folder:
        reload_plugin.reload_weights(model.model, weights_path=written(model, generation, Path(folder)))


def from_host(model: driver.Built, generation: str) -> None:
    import reload_plugin

    reload_plugin.reload_weights(model.model, iter(weights(model, generation)))


def from_device(model: driver.Built, generation: str) -> None:
    import reload_plugin

    moved = ((name, tensor.to(DEVICE)) for name, tensor in weights(model, generation))
    reload_plugin.reload_weights(model.model, moved)


def from_reused_buffer(model: driver.Built, generation: str) -> None:
    import reload_plugin

    reload_plugin.reload_weights(model.model, through_one_buffer(weights(model, generation)))


def in_chunks(model: driver.Built, generation: str, parts: int = 6) -> None:
    import reload_plugin

    with reload_plugin.restore_for_reloading(model.model):
        for chunk in on_two_streams(weights(model, generation), parts):
            model.model.load_weights(chunk)


def one_by_one(model: driver.Built, generation: str) -> None:
    for pair in weights(model, generation):
        model.model.load_weights([(pair[0], pair[1].to(DEVICE))])
    from reload_plugin.vllm_hooks import live

    live.before_forward_pass(model.model)


ROADS: dict[str, Callable[[driver.Built, str], None]] = {
    "folder": from_folder,
    "host iterator": from_host,
    "device iterator": from_device,
    "reused buffer": from_reused_buffer,
    "chunks on two streams": in_chunks,
    "live push": one_by_one,
}


def through_one_buffer(pairs: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Through one buffer of device memory that another stream writes, as a receiver of another process does:
    it is overwritten as soon as the next weight is asked for.
    """
    buffer = torch.empty(max(tensor.nbytes for _, tensor in pairs), dtype=torch.uint8, device=DEVICE)
    receiver = torch.Stream(device=DEVICE)
    torch.accelerator.synchronize()
    for name, tensor in pairs:
        view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with receiver:
            buffer.fill_(0xFF)
            view.copy_(tensor)
        receiver.synchronize()
        yield name, view
        with receiver:
            buffer.fill_(0xFF)
        receiver.synchronize()


def on_two_streams(pairs: Weights, parts: int = 6) -> Iterator[Iterable[tuple[str, torch.Tensor]]]:
    """Chunks, each received and given on one of two streams in turn, with the stream as the current one.

    As the consumer of vLLM's packed transfer: a chunk's memory is reused when its stream has done its work.
    """
    streams = (torch.Stream(device=DEVICE), torch.Stream(device=DEVICE))
    torch.accelerator.synchronize()
    for number in range(parts):
        with streams[number % 2]:
            mine = pairs[len(pairs) * number // parts : len(pairs) * (number + 1) // parts]
            yield [(name, tensor.pin_memory().to(DEVICE, non_blocking=True)) for name, tensor in mine]


# -- what is asked --------------------------------------------------------------------------------


def expect_cold(name: str, generation: str, model: driver.Built, layers: int | None = None) -> None:
    """Raises AssertionError with what differs from a cold start on these weights."""
    torch.accelerator.synchronize()
    with load().limit(1 << 40):
        expected = cold(name, generation, layers)
        now = on_host(walker.take_picture(model.model))
    load().empty_cache()
    found = walker.differences(expected, now)
    _expect_none(line for line in found if not line.startswith(GUARD))


def expect_unmoved(before: walker.Picture, model: driver.Built) -> None:
    """Raises AssertionError with the tensors that are not the objects, or not at the addresses, they were."""
    _expect_none(walker.moved(before, walker.take_picture(model.model)))


def _expect_none(lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        raise AssertionError("\n".join([f"{len(lines)} differences", *lines[:6]]))
