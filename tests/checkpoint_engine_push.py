"""checkpoint-engine's own worker extension, fed over ZMQ; one JSON line a model.

    python -m tests.checkpoint_engine_push llama_tied mixtral

Run by `engine/test_frameworks.py` with the interpreter of `.venv-frameworks`. The sender's side is played
here, with the extension's protocol; its own one needs a device, and so does what it does to find one: the
two things that are stood in for are the device's module and its name.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

from tests.roads import Lab, Weights, lab  # before torch: it sets the environment that engines read

import pytest  # isort: skip
import torch  # isort: skip
import zmq  # isort: skip
from checkpoint_engine import worker  # isort: skip

EXTENSION = "checkpoint_engine.worker.VllmColocateWorkerExtension"
DEVICE = "the CPU"
BUCKET = 1 << 20
"""Bytes of the buffer that all buckets of a push share."""
ALIGNMENT = 256
RECEIVE_TIMEOUT_MS = 60_000


class NoDevice:
    """In place of `DeviceManager`: a CPU has nothing to wait for and no cache to empty."""

    device_module = types.SimpleNamespace(
        synchronize=lambda: None, ipc_collect=lambda: None, empty_cache=lambda: None
    )


def open_buffer(name: str, size: int) -> torch.Tensor:
    """The sender's buffer in the receiver."""
    segment = shared_memory.SharedMemory(name)
    buffer = torch.frombuffer(segment.buf, dtype=torch.uint8, count=size)
    _segments.append(segment)  # the tensor does not keep it
    return buffer


_segments: list[shared_memory.SharedMemory] = []


class Sender(threading.Thread):
    """What checkpoint-engine's parameter server does for one worker."""

    def __init__(self, weights: Weights, address: str) -> None:
        super().__init__(daemon=True)
        self.weights, self.address = weights, address
        self.answers: list[str] = []
        """Errors that the worker answered with."""

    def run(self) -> None:
        segment = shared_memory.SharedMemory(create=True, size=BUCKET)
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.RCVTIMEO, RECEIVE_TIMEOUT_MS)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(self.address)
            self._send(socket, segment)
        segment.close()
        segment.unlink()

    def _send(self, socket: zmq.Socket, segment: shared_memory.SharedMemory) -> None:
        ask(socket, (open_buffer, (segment.name, BUCKET)))
        for described in filled(self.weights, segment):
            if (error := ask(socket, described)) != "":
                self.answers.append(error)
                socket.send_pyobj(RuntimeError("a worker failed"))
                return
        ask(socket, None)
        ask(socket, None)


def ask(socket: zmq.Socket, payload: object) -> str:
    socket.send_pyobj(payload)
    return socket.recv().decode()


def filled(weights: Weights, segment: shared_memory.SharedMemory) -> Iterator[list[dict[str, object]]]:
    """Fills the buffer with as many weights as go into it, and says where they are."""
    buffer = torch.frombuffer(segment.buf, dtype=torch.uint8, count=BUCKET)
    described: list[dict[str, object]] = []
    offset = 0
    for name, tensor in weights:
        if described and offset + tensor.nbytes > BUCKET:
            yield described
            buffer.fill_(255)
            described, offset = [], 0
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        buffer[offset : offset + tensor.nbytes].copy_(flat)
        described.append({"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "offset": offset})
        offset = math.ceil((offset + tensor.nbytes) / ALIGNMENT) * ALIGNMENT
    yield described
    buffer.fill_(255)
    del buffer


def push(lab: Lab, weights: Weights, folder: Path) -> list[str]:
    """One update by the extension's own method, as its README calls it; errors that its sender was told."""
    sender = Sender(weights, f"ipc://{folder}/socket")
    sender.start()
    try:
        lab.llm.collective_rpc("update_weights_from_ipc", args=({DEVICE: sender.address},))
    finally:
        sender.join(timeout=2 * RECEIVE_TIMEOUT_MS / 1000)
    return sender.answers


def try_model(name: str, root: Path) -> dict[str, str]:
    """What is not as after a cold start, by leg; empty strings if nothing."""
    said = {}
    with lab(name, root, worker_extension_cls=EXTENSION) as engine:
        for leg, letter in enumerate("BBA"):
            assert push(engine, engine.weights[letter], root) == []
            said[f"{leg}: {letter}"] = engine.difference(letter)
            engine.assert_answers(letter)
        said["bad push"] = bad_push(engine, root)
        assert push(engine, engine.weights["B"], root) == []
        said["good push after a bad one"] = engine.difference("B")
    return said


def bad_push(engine: Lab, root: Path) -> str:
    """A wrong shape in the middle: the sender is told, the call raises, and the old weights are served."""
    weights = list(engine.weights["B"])
    at = len(weights) // 2
    name, tensor = weights[at]
    weights[at] = (name, torch.zeros((*tensor.shape, 2), dtype=tensor.dtype))
    sender = Sender(weights, f"ipc://{root}/socket")
    sender.start()
    with pytest.raises(RuntimeError, match="a worker failed"):
        engine.llm.collective_rpc("update_weights_from_ipc", args=({DEVICE: sender.address},))
    sender.join(timeout=2 * RECEIVE_TIMEOUT_MS / 1000)
    answers = sender.answers
    assert len(answers) == 1
    assert name in answers[0], answers
    assert "serves what it served before" in answers[0], answers
    return engine.difference("A")


def main() -> None:
    worker.DeviceManager = NoDevice
    worker.VllmColocateWorkerExtension._device_uuid = DEVICE
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as root:
            print(json.dumps({"model": name, "legs": try_model(name, Path(root))}), flush=True)


if __name__ == "__main__":
    # Pickles name the module of a function, and the receiver's is not `__main__`.
    from tests import checkpoint_engine_push

    checkpoint_engine_push.main()
