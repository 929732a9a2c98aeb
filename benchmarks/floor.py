"""The floor of a reload: work that no reload can avoid, measured with warm memory.

*copy*: every byte of the checkpoint copied once, in one piece, to the device that serves. *process*:
`process_weights_after_loading` (PWAL) of every layer once, into pages the process already has; page faults
would be half its cost. Both after `machine.keep_memory`.

Three more parts are nearer to a reload. *read*: plain reads of the files into one small buffer. *once*: the
first PWAL of each layer, when its values are in no cache. *hash*: the digest of as many bytes as the
checkpoint has, by the code that a reload uses.
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
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
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
    """Median seconds to hash as many bytes as the checkpoint has, in warm memory."""
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
    """While entered, an engine that starts runs PWAL on each layer several times.

    `seconds` sums the fastest trial of each layer, `once` the first, `layers` counts the layers. This covers
    PWAL after loading, online quantization while loading, attention layers and the model's own hook. Before
    each trial after the first the layers and their helper objects are restored. The caller has to compare
    the answers of the engine with those of any other engine on the checkpoint.

    Raises:
        RuntimeError: a trial had another effect than the first one.

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
        """Build the model, and time its PWAL from now on."""
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
            # Directly, not by torch.nn.Module's __setattr__: this is a plain instance attribute.
            vars(owner)["process_weights_after_loading"] = self._timed(process, owner)

    def _unwrap(self) -> None:
        for owner in self._wrapped.values():
            vars(owner).pop("process_weights_after_loading", None)
        self._wrapped.clear()

    def _timed(self, process: Callable[..., None], owner: Any) -> Callable[..., None]:
        """The call, several times. ``owner`` is a quant method, which is called with a layer, or a layer."""

        def repeat(*arguments: Any) -> None:
            if self._inside:  # called by a call that is being timed
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
    """Seconds of each trial; the effect of the last one stays."""
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
    """These objects and the objects of vLLM that they hold (schemes, kernels, experts), each once.

    Without other layers, and without objects that have no attributes.
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
    """Remember attributes and parameters; the returned function restores them. Values are not copied."""
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
    """Names of attributes, and address, shape and dtype of tensors: what a trial changes shows here."""
    state: dict[tuple[int, str], object] = {}
    for number, holder in enumerate(holders):
        tensors = _tensors(holder) if isinstance(holder, torch.nn.Module) else {}
        state |= {(number, name): (t.data_ptr(), tuple(t.shape), t.dtype) for name, t in tensors.items()}
        state |= {(number, name): True for name in vars(holder)}
    return state


def _tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    return {name: tensor for name, tensor in own.items() if tensor.device.type != "meta"}
