"""The floor under a reload: what no reload can do without, measured with memory that is already there.

*copy*: every byte of the checkpoint moved once, in one piece. *process*: `process_weights_after_loading` of
every layer once, into pages the process already owns; page faults are half its cost otherwise. Run in a
process whose allocator keeps what it has (`KEEP_MEMORY`).
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# glibc: take large blocks from the heap, and never give it back.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
TRIALS = 3


def copy_seconds(folder: str | Path) -> float:
    """Median seconds to copy the checkpoint's bytes from the page cache into one block of touched memory."""
    files = [np.memmap(path, mode="c") for path in sorted(Path(folder).glob("*.safetensors"))]
    sources = [torch.from_numpy(file) for file in files]
    targets = [torch.zeros_like(source) for source in sources]
    times = []
    for _ in range(TRIALS + 1):
        started = time.perf_counter()
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first also maps the file


class TimedProcessing:
    """While entered, an engine that starts processes each layer several times.

    `seconds` sums the fastest. Between trials a layer is put back as far as those of `models.py` need it: its
    attributes, its parameters and the attributes of its quant method.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "TimedProcessing":
        from vllm.model_executor.model_loader import base_loader

        self._module, self._original = base_loader, base_loader.process_weights_after_loading
        base_loader.process_weights_after_loading = self._process_model
        return self

    def __exit__(self, *_: object) -> None:
        self._module.process_weights_after_loading = self._original

    def _process_model(self, model: torch.nn.Module, *arguments: Any) -> None:
        methods = {id(m.quant_method): m.quant_method for m in model.modules() if hasattr(m, "quant_method")}
        for method in methods.values():
            method.process_weights_after_loading = self._timed(method.process_weights_after_loading, method)
        try:
            self._original(model, *arguments)
        finally:
            for method in methods.values():
                vars(method).pop("process_weights_after_loading", None)

    def _timed(self, process: Callable[[torch.nn.Module], None], method: Any) -> Callable:
        def repeat(layer: torch.nn.Module) -> None:
            times = []
            for trial in range(TRIALS):
                undo = _undo(layer, method)
                started = time.perf_counter()
                process(layer)
                times.append(time.perf_counter() - started)
                if trial < TRIALS - 1:
                    undo()
            self.seconds += min(times)

        return repeat


def _undo(layer: torch.nn.Module, method: Any) -> Callable[[], None]:
    """Remember layer and method; the returned call puts them back."""
    tables = ("_parameters", "_buffers", "_modules")
    kept = {name: dict(value) if name in tables else value for name, value in vars(layer).items()}
    data = [(parameter, parameter.data) for parameter in layer.parameters(recurse=False)]
    of_method = dict(vars(method))

    def undo() -> None:
        for holder, before in ((layer, kept), (method, of_method)):
            vars(holder).clear()
            vars(holder).update(before)
        for parameter, values in data:
            parameter.data = values

    return undo
