"""Every road by which frameworks push weights into a running engine, on every kind of model.

Each road pushes checkpoint B into an engine that was started on A, and the engine has to be the one that a
start on B gives: tokens, logprobs, every tensor that can be reached, and objects and addresses as before. Or
the road fails, and the engine has to be the one it was.

    python -m tests.roads llama mixtral  # run models here and print what differs
    python -m tests.roads --table        # all of them, as a Markdown table
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests import oracle  # before torch: it sets the environment that engines read

import pytest  # isort: skip
import torch  # isort: skip

from reload_plugin import ReloadError, status
from reload_plugin.vllm_hooks import workers
from tests.checkpoints import read_tensors
from tests.zoo import Case, case_named

MODELS = ("llama", "llama_tied", "mixtral", "deepseek_v2", "w8a8_dynamic", "gemma3")
Weights = list[tuple[str, torch.Tensor]]


@dataclass
class Lab:
    """An engine that was started on A, and what engines look like that were started on A and on B."""

    llm: object
    case: object
    weights: dict[str, Weights]
    cold: dict[str, oracle.Snapshot]
    places: oracle.Snapshot
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def model(self) -> torch.nn.Module:
        return oracle.model_of(self.llm)

    def rpc(self, call: Callable[[object], object]) -> object:
        """A call of the worker, as frameworks make through `collective_rpc`."""
        return self.llm.collective_rpc(call)[0]

    def difference(self, letter: str) -> str:
        """What is not as after a start on that checkpoint; empty if nothing."""
        now = oracle.snapshot(self.llm, self.case)
        found = oracle.compare_values(letter, now, self.cold[letter])
        found += oracle.compare_places(letter, self.places, now)
        return "; ".join(str(one) for one in found[:3])

    def assert_answers(self, letter: str) -> None:
        assert oracle.differing_answers(oracle.answer(self.llm), self.cold[letter].answers) == []

    def serve(self) -> None:
        """A forward pass."""
        oracle.answer(self.llm)

    def process(self) -> None:
        """vLLM's whole-model processing, which frameworks call after a push."""
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        device = next(self.model.parameters()).device
        process_weights_after_loading(self.model, self.llm.llm_engine.model_config, device)


@contextlib.contextmanager
def lab(name: str, root: Path, **overrides: object) -> Iterator[Lab]:
    """The lab of one model of the zoo; ``overrides`` are arguments of its engine."""
    with lab_of(case_named(name), root, **overrides) as one:
        yield one


@contextlib.contextmanager
def lab_of(case: Case, root: Path, **overrides: object) -> Iterator[Lab]:
    """The same of any case."""
    folders = oracle.write(case, root)
    with oracle.running(case, folders["B"]) as llm:
        cold_b = oracle.snapshot(llm, case)
    with oracle.running(case, folders["A"], **overrides) as llm:
        cold_a = oracle.snapshot(llm, case)
        weights = {letter: list(read_tensors(folders[letter]).items()) for letter in "AB"}
        yield Lab(llm, case, weights, {"A": cold_a, "B": cold_b}, cold_a, folders)


Road = Callable[[Lab, Weights], None]

# --- roads that push all of a checkpoint ---


def whole(lab: Lab, weights: Weights) -> None:
    """One call."""
    lab.model.load_weights(iter(weights))


def tensor_by_tensor(lab: Lab, weights: Weights) -> None:
    """TRL colocated, unsloth: one call a tensor in the trainer's process, nothing after."""
    for pair in weights:
        lab.model.load_weights([pair])


def one_rpc_a_tensor(lab: Lab, weights: Weights) -> None:
    """OpenRLHF: one RPC a tensor, the last with `empty_cache`."""

    def update_weight(worker: object, name: str, tensor: torch.Tensor, empty_cache: bool) -> None:
        worker.model_runner.model.load_weights(weights=[(name, tensor)])
        del tensor
        if empty_cache:
            torch.cuda.empty_cache()

    last = weights[-1][0]
    for name, tensor in weights:
        lab.rpc(lambda worker, n=name, t=tensor: update_weight(worker, n, t, n == last))


def buckets(lab: Lab, weights: Weights, size: int = 5) -> Iterator[Weights]:
    """Parts of a checkpoint as views of one buffer that is overwritten for the next."""
    largest = max(sum(t.nbytes + 64 for _, t in weights[k : k + size]) for k in range(0, len(weights), size))
    bucket = torch.empty(largest, dtype=torch.uint8)
    for start in range(0, len(weights), size):
        part, offset = [], 0
        for name, tensor in weights[start : start + size]:
            view = bucket[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            part.append((name, view.copy_(tensor)))
            offset += -(-tensor.nbytes // 64) * 64
        yield part
        bucket.fill_(255)


def reused_buckets(lab: Lab, weights: Weights) -> None:
    for part in buckets(lab, weights):
        lab.model.load_weights(part)


def shuffled(lab: Lab, weights: Weights) -> None:
    order = list(weights)
    random.Random(0).shuffle(order)
    tensor_by_tensor(lab, order)


def from_float32(lab: Lab, weights: Weights) -> None:
    """A trainer that keeps float32 masters."""
    lab.model.load_weights((n, t.float() if t.dtype == torch.bfloat16 else t) for n, t in weights)


def twice_in_a_row(lab: Lab, weights: Weights) -> None:
    """The trainer pushes other weights first, and nothing serves in between."""
    tensor_by_tensor(lab, [(n, torch.zeros_like(t)) for n, t in weights])
    tensor_by_tensor(lab, weights)


def forward_passes_between(lab: Lab, weights: Weights) -> None:
    """Requests run while an asynchronous trainer pushes; they get the old weights."""
    letter = "A" if weights is lab.weights["B"] else "B"
    for start in range(0, len(weights), 4):
        lab.model.load_weights(weights[start : start + 4])
        if start + 4 < len(weights):
            lab.assert_answers(letter)


def processed_twice(lab: Lab, weights: Weights) -> None:
    """NeMo-RL: whole-model processing after the push, and once more."""
    lab.model.load_weights(iter(weights))
    lab.process()
    lab.process()


def buckets_then_processing(lab: Lab, weights: Weights) -> None:
    """verl, checkpoint-engine: buckets and then processing, all in one RPC."""

    def update(worker: object) -> None:
        for part in buckets(lab, weights):
            worker.model_runner.model.load_weights(part)
        lab.process()

    lab.rpc(update)


def several_rpcs(lab: Lab, weights: Weights) -> None:
    """AReaL: several RPCs, each with a group of weights; answers with success or a message."""
    for start in range(0, len(weights), 7):
        part = weights[start : start + 7]
        assert lab.rpc(lambda worker, part=part: answering(worker, part)) == (True, "Success")


def answering(worker: object, part: Weights) -> tuple[bool, str]:
    """AReaL's way to say how an update went."""
    try:
        worker.model_runner.model.load_weights(part)
    except Exception as error:  # noqa: BLE001 - as AReaL does
        return False, f"failed to upload weights! {error}"
    return True, "Success"


def layerwise_under_a_device(lab: Lab, weights: Weights) -> None:
    """prime-rl: initialize, load, finalize under an active `torch.device(...)`, by the newer name."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_processing,
        initialize_layerwise_reload,
    )

    def update(worker: object) -> None:
        model = worker.model_runner.model
        with torch.device("cpu"):
            initialize_layerwise_reload(model)
            model.load_weights(iter(weights))
            finalize_layerwise_processing(model, worker.model_runner.model_config)

    lab.rpc(update)


def chunks_and_nameless_loads(lab: Lab, weights: Weights) -> None:
    """SkyRL: chunks between initialize and finalize; some parameters by their own `weight_loader`."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    def update(worker: object) -> None:
        model = worker.model_runner.model
        initialize_layerwise_reload(model)
        served = dict(model.named_parameters())
        by_hand = [name for name, _ in weights if name in served and name.endswith("norm.weight")]
        for start in range(0, len(weights), 6):
            model.load_weights([pair for pair in weights[start : start + 6] if pair[0] not in by_hand])
        for name, tensor in weights:
            if name in by_hand:
                parameter = dict(model.named_parameters())[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
        finalize_layerwise_reload(model, worker.model_runner.model_config)

    lab.rpc(update)


def asleep_in_between(lab: Lab, weights: Weights) -> None:
    """Half a push, sleep and wake up, then all of it. A CPU cannot sleep: the worker's hooks are called."""
    lab.model.load_weights(weights[: len(weights) // 2])
    lab.rpc(lambda worker: workers.sleeping(lambda *_: None)(worker, 1))
    lab.rpc(lambda worker: workers.waking(lambda *_: None)(worker))
    tensor_by_tensor(lab, weights)


PUSHES = (
    whole,
    tensor_by_tensor,
    one_rpc_a_tensor,
    reused_buckets,
    shuffled,
    from_float32,
    twice_in_a_row,
    forward_passes_between,
    processed_twice,
    buckets_then_processing,
    several_rpcs,
    layerwise_under_a_device,
    chunks_and_nameless_loads,
    asleep_in_between,
)
"""Roads that end in a cold start's engine."""


# --- roads that fail ---


def interrupted_half_way(lab: Lab, weights: Weights) -> None:
    """The trainer stops in the middle, and the next push begins anew."""
    lab.model.load_weights(weights[: len(weights) // 2])
    lab.serve()


def iterator_raises(lab: Lab, weights: Weights) -> None:
    def raising() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights[: len(weights) // 2]
        raise OSError("the trainer is gone")

    refused(lab, lambda: lab.model.load_weights(raising()), "the trainer is gone")


def wrong_shape_in_the_middle(lab: Lab, weights: Weights) -> None:
    at = len(weights) // 2
    name, tensor = weights[at]
    wrong = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
    tensor_by_tensor(lab, weights[:at])
    refused(lab, lambda: lab.model.load_weights([(name, wrong)]), name)


def unknown_name(lab: Lab, weights: Weights) -> None:
    tensor_by_tensor(lab, weights[:2])
    refused(lab, lambda: lab.model.load_weights([("model.nowhere.weight", torch.zeros(3))]), "nowhere")


def answered_error(lab: Lab, weights: Weights) -> None:
    """AReaL: the worker's answer says that the update failed, and the engine goes on serving."""
    name, tensor = weights[1]
    wrong = [weights[0], (name, tensor.reshape(1, *tensor.shape, 1))]
    good, said = lab.rpc(lambda worker: answering(worker, wrong))
    assert not good
    assert name in said, said
    lab.serve()


def swallowed_error(lab: Lab, weights: Weights) -> None:
    """ms-swift: errors of the push and of processing are swallowed; the next request says so."""
    name, tensor = weights[1]

    def update(worker: object) -> bool:
        with contextlib.suppress(Exception):
            worker.model_runner.model.load_weights([weights[0], (name, tensor.reshape(1, *tensor.shape, 1))])
        for pair in weights[2:]:
            with contextlib.suppress(Exception):
                worker.model_runner.model.load_weights([pair])
        with contextlib.suppress(Exception):
            lab.process()
        return True

    assert lab.rpc(update)
    refused(lab, lambda: lab.rpc(lambda worker: workers.guarding(lambda *_: None)(worker)), name)


def refused(lab: Lab, call: Callable[[], object], says: str) -> None:
    """The call raises an error of ours that names what, and says that the old weights are served."""
    with pytest.raises(ReloadError) as caught:
        call()
    assert says in str(caught.value), str(caught.value)
    assert "serves what it served before" in str(caught.value), str(caught.value)


FAILURES = (
    interrupted_half_way,
    iterator_raises,
    wrong_shape_in_the_middle,
    unknown_name,
    answered_error,
    swallowed_error,
)
"""Roads after which the engine is the one it was."""


# --- running them ---


def try_push(lab: Lab, road: Road) -> str:
    """B and back to A by a road; what went wrong, empty if nothing."""
    for letter in "BA":
        before = status(lab.llm, digest=False)[0].version
        try:
            road(lab, lab.weights[letter])
        except Exception as error:  # noqa: BLE001 - shown in the table
            return f"{letter}: {type(error).__name__}: {str(error).splitlines()[0]}"
        if found := lab.difference(letter):
            return found
        said = status(lab.llm)[0]
        if said.state != "serving" or not said.known or said.version <= before:
            return f"{letter}: status says {said.state}, known {said.known}, version {said.version}"
    return ""


def try_failure(lab: Lab, road: Road) -> str:
    """A road that fails while A is served; what went wrong, empty if nothing."""
    try:
        road(lab, lab.weights["B"])
    except Exception as error:  # noqa: BLE001 - shown in the table
        return f"{type(error).__name__}: {error}"
    if found := lab.difference("A"):
        return found
    return try_push(lab, whole)


def run(name: str, root: Path, of: Callable[..., contextlib.AbstractContextManager[Lab]]) -> dict[str, str]:
    """Every road on one model: its name -> what went wrong."""
    with of(name, root) as one:
        pushes = {road.__name__: try_push(one, road) for road in PUSHES}
        return pushes | {road.__name__: try_failure(one, road) for road in FAILURES}


def main(arguments: list[str] | None = None, of: Callable[..., object] = lab) -> None:
    """Read the command line, run roads in the labs that ``of`` gives, print what went wrong."""
    parser = argparse.ArgumentParser(description="Every road on every kind of model.")
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args(arguments)
    found = {}
    for name in asked.models:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(name, Path(folder), of)
    if asked.table:
        print("| road |", " | ".join(found), "|")
        print("|---|" + "---|" * len(found))
    for road in (*PUSHES, *FAILURES):
        cells = [one[road.__name__] for one in found.values()]
        right = "right" if road in PUSHES else "old weights"
        if asked.table:
            print(f"| `{road.__name__}` |", " | ".join(cell or right for cell in cells), "|")
        else:
            print(road.__name__, {name: cell or right for name, cell in zip(found, cells, strict=True)})
    sys.exit(any(cell for one in found.values() for cell in one.values()))


if __name__ == "__main__":
    main()
