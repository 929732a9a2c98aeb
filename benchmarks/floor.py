"""The floor under a reload: what no reload can do without, measured with memory that is already there.

*copy*: every byte of the checkpoint moved once, in one piece, onto the device that serves. *process*:
`process_weights_after_loading` of every layer once, into pages the process already owns; page faults are half
its cost otherwise. Both after `machine.keep_memory`.

Beside it, what is nearer to a reload: *read*, the files by plain reads into one small buffer, *once*, the
first time that each layer is processed, when its values are in no cache, and *hash*, the digest of as many
bytes, by the same code as a reload's.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from reload_plugin.device.hashing import Hash

TRIALS = 3
PIECE = 2 * machine.MIB
"""Bytes of one read."""


def copy_seconds(folder: str | Path) -> float:
    """Median seconds to copy the checkpoint's bytes from the page cache into one block of touched memory."""
    device = "cuda" if machine.has_cuda() else "cpu"
    files = [np.memmap(path, mode="c") for path in sorted(Path(folder).glob("*.safetensors"))]
    sources = [torch.from_numpy(file) for file in files]
    targets = [torch.zeros_like(source, device=device) for source in sources]
    times = []
    for _ in range(TRIALS + 1):
        machine.synchronize()
        started = time.perf_counter()
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        machine.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first also maps the file


def read_seconds(folder: str | Path) -> float:
    """Median seconds to read the checkpoint's files from the page cache into one buffer, piece by piece."""
    buffer = memoryview(bytearray(PIECE))
    times = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        for path in Path(folder).glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def hash_seconds(folder: str | Path) -> float:
    """Median seconds to hash as many bytes as the checkpoint has, in memory that is there."""
    nbytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    values = torch.zeros(nbytes, dtype=torch.uint8)
    times = []
    for _ in range(TRIALS):
        total = Hash()
        started = time.perf_counter()
        total.add_tensor(values)
        total.digest()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class TimedProcessing:
    """While entered, an engine that starts processes each layer several times.

    `seconds` sums the fastest trial of each, `once` the first, `layers` counts them. That covers what
    vLLM processes at the end, what it quantizes while loading, attention layers and the model's own hook.
    Before each trial after the first everything is put back: the layers and their helper objects. A trial
    that did not do the same as the first (because something remembered that it was done) is an error. The
    engine that comes out has to answer as any other: ask it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.once = 0.0
        self.layers = 0
        self._inside = False
        self._wrapped: dict[int, Any] = {}

    def __enter__(self) -> "TimedProcessing":
        from vllm.model_executor.model_loader import base_loader

        self._module = base_loader
        self._build, self._process = base_loader.initialize_model, base_loader.process_weights_after_loading
        base_loader.initialize_model = self._building
        base_loader.process_weights_after_loading = self._processing
        return self

    def __exit__(self, *_: object) -> None:
        self._module.initialize_model = self._build
        self._module.process_weights_after_loading = self._process
        self._unwrap()

    def _building(self, *arguments: Any, **keywords: Any) -> torch.nn.Module:
        """Build the model; what it does to its weights is timed from now on."""
        model = self._build(*arguments, **keywords)
        for module in model.modules():
            self._wrap(getattr(module, "quant_method", None))
            self._wrap(module)
        return model

    def _processing(self, model: torch.nn.Module, *arguments: Any) -> None:
        try:
            self._process(model, *arguments)
        finally:
            self._unwrap()

    def _wrap(self, owner: Any) -> None:
        process = getattr(owner, "process_weights_after_loading", None)
        if process is not None and id(owner) not in self._wrapped:
            self._wrapped[id(owner)] = owner
            # Past torch.nn.Module's own __setattr__, which would do no harm and is not meant.
            vars(owner)["process_weights_after_loading"] = self._timed(process, owner)

    def _unwrap(self) -> None:
        for owner in self._wrapped.values():
            vars(owner).pop("process_weights_after_loading", None)
        self._wrapped.clear()

    def _timed(self, process: Callable[..., None], owner: Any) -> Callable[..., None]:
        """The same call, several times over. ``owner`` is a quant method (called with a layer) or a layer."""

        def repeat(*arguments: Any) -> None:
            if self._inside:  # part of what is being timed
                process(*arguments)
                return
            layers = [
                layer
                for item in (owner, *arguments)
                if isinstance(item, torch.nn.Module)
                for layer in item.modules()
            ]
            with self._alone():
                times = _trials(lambda: process(*arguments), _helpers([owner, *layers]))
            self.seconds += min(times)
            self.once += times[0]
            self.layers += 1

        return repeat

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


def _trials(process: Callable[[], None], holders: list[Any]) -> list[float]:
    """Seconds of each trial; what the last one did stays."""
    times, effects = [], []
    for trial in range(TRIALS):
        undo = _undo(holders)
        before = _state(holders)
        machine.synchronize()
        started = time.perf_counter()
        process()
        machine.synchronize()
        times.append(time.perf_counter() - started)
        after = _state(holders)
        effects.append({name for name in before.keys() | after.keys() if before.get(name) != after.get(name)})
        if trial < TRIALS - 1:
            undo()
    if any(effect != effects[0] for effect in effects):
        raise RuntimeError(f"processing did not do the same each time: {[sorted(one) for one in effects]}")
    return times


_TABLES = ("_parameters", "_buffers", "_modules")


def _helpers(holders: list[Any], depth: int = 3) -> list[Any]:
    """These objects and vLLM's own objects that they hold (schemes, kernels, experts), each once.

    Other layers are not among them, nor what has no attributes.
    """
    found: dict[int, Any] = {id(holder): holder for holder in holders}
    for _ in range(depth):
        for holder in list(found.values()):
            for value in vars(holder).values():
                ours = type(value).__module__.startswith(("vllm.", "tests."))
                if ours and hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, type)):
                    found.setdefault(id(value), value)
    return list(found.values())


def _undo(holders: list[Any]) -> Callable[[], None]:
    """Remember attributes and parameters; the returned call puts them back. Values are not copied."""
    kept = [
        (holder, {name: dict(v) if name in _TABLES else v for name, v in vars(holder).items()})
        for holder in holders
    ]
    layers = [holder for holder in holders if isinstance(holder, torch.nn.Module)]
    tensors = [tensor for layer in layers for tensor in _tensors(layer).values()]
    data = [(tensor, tensor.data, dict(vars(tensor))) for tensor in tensors]

    def undo() -> None:
        for holder, before in kept:
            vars(holder).clear()
            vars(holder).update(before)
        for tensor, values, attributes in data:
            tensor.data = values
            vars(tensor).clear()
            vars(tensor).update(attributes)

    return undo


def _state(holders: list[Any]) -> dict[tuple[int, str], object]:
    """Which attributes there are and, of tensors, where they lie: enough to see what a trial changed."""
    state: dict[tuple[int, str], object] = {}
    for number, holder in enumerate(holders):
        tensors = _tensors(holder) if isinstance(holder, torch.nn.Module) else {}
        state |= {(number, name): (t.data_ptr(), tuple(t.shape), t.dtype) for name, t in tensors.items()}
        state |= {(number, name): True for name in vars(holder)}
    return state


def _tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    return {name: tensor for name, tensor in own.items() if tensor.device.type != "meta"}
