"""What only a GPU shows: CUDA graphs over reloads, FP8 made from bf16 online, a full card, streams, sleep.

Not run where there is no GPU, and not yet run at all. The same oracle as on the CPU: after each reload the
engine is the one of a cold start, with every tensor at the address it had.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import oracle, roads
from tests.full_card import Peak, filled
from tests.zoo import Case, case_named

import torch  # isort: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU"),
]

CASES = ("llama", "llama_tied", "mixtral", "qwen2_moe")
CACHE = {"kv_cache_memory_bytes": 256 << 20}
MODES: dict[str, dict[str, object]] = {
    "eager": {"enforce_eager": True} | CACHE,
    "graphs": {"enforce_eager": False} | CACHE,
    "full graphs": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL"}} | CACHE,
}
"""Without graphs; with those of vLLM's default; with one graph for the whole model."""
FP8 = {"quantization": "fp8"}


def with_options(case: Case, **options: object) -> Case:
    """A case, started with other options."""
    return dataclasses.replace(case, engine_kwargs=dict(case.engine_kwargs) | options)


def captured_graphs() -> int:
    """Number of graphs that this process has captured so far."""
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_cudagraph_captured


def differences(case: Case, root: Path) -> Iterator[oracle.Difference]:
    """Start on A, reload B, A and B by folder, stream and folder again; each against a cold start."""
    folders = oracle.write(case, root)
    cold = {}
    for letter in "AB":
        with oracle.running(case, folders[letter]) as llm:
            cold[letter] = oracle.snapshot(llm, case)
    before = captured_graphs()
    with oracle.running(case, folders["A"]) as llm:
        captured = captured_graphs()
        assert (captured > before) is not case.engine_kwargs["enforce_eager"]
        start = oracle.snapshot(llm, case)
        steps = (
            ("B", oracle.reload_from_folder),
            ("A", oracle.reload_from_stream),
            ("B", oracle.reload_from_folder),
        )
        for number, (letter, reload) in enumerate(steps):
            reload(llm, folders[letter])
            now = oracle.snapshot(llm, case)
            yield from oracle.compare_values(f"{number} to {letter}", now, cold[letter])
            yield from oracle.compare_places(f"{number} to {letter}", start, now)
        assert captured_graphs() == captured


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_warm_equals_cold(name: str, mode: str, tmp_path: Path) -> None:
    assert list(differences(with_options(case_named(name), **MODES[mode]), tmp_path)) == []


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("mode", MODES)
def test_bf16_checkpoints_become_fp8_again(name: str, mode: str, tmp_path: Path) -> None:
    """Online quantization: the trainer sends bf16, the kernels read FP8."""
    assert list(differences(with_options(case_named(name), **MODES[mode], **FP8), tmp_path)) == []


def test_reloads_leave_no_memory_behind(tmp_path: Path) -> None:
    case = with_options(case_named("llama"), **MODES["graphs"])
    folders = oracle.write(case, tmp_path)
    with oracle.running(case, folders["A"]) as llm:
        for letter in "BA":
            oracle.reload_from_stream(llm, folders[letter])
        torch.accelerator.synchronize()
        before = torch.accelerator.memory_allocated()
        for letter in "BABABABA":
            oracle.reload_from_stream(llm, folders[letter])
        torch.accelerator.synchronize()
        assert torch.accelerator.memory_allocated() <= before


# --- a full card, and streams ---

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
}
"""1.7 GB in bf16, 90 MB a layer: torch's allocator gives memory out in pieces of 2 to 20 MiB."""
SPARE = 0.08
"""Of the weights' bytes: free on the card."""
BEYOND = 96 << 20
"""Bytes of the device that a reload may take beside the largest layer."""


def on_device(weights: roads.Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """One weight at a time on the device, through one buffer that another stream writes."""
    device = torch.accelerator.current_accelerator()
    buffer = torch.empty(max(tensor.nbytes for _, tensor in weights), dtype=torch.uint8, device=device)
    receiver = torch.Stream(device=device)
    torch.accelerator.synchronize()
    for name, tensor in weights:
        view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with receiver:
            view.copy_(tensor)
        receiver.synchronize()
        yield name, view


def device_iterator(lab: roads.Lab, weights: roads.Weights) -> None:
    lab.rpc(lambda worker: worker.model_runner.reload_weights(weights_iterator=on_device(weights)))


def host_iterator(lab: roads.Lab, weights: roads.Weights) -> None:
    lab.rpc(lambda worker: worker.model_runner.reload_weights(weights_iterator=iter(weights)))


def chunks_on_two_streams(lab: roads.Lab, weights: roads.Weights) -> None:
    """vLLM's packed transfer: two streams in turn, each with the stream as the current one."""
    from reload_plugin import restore_for_reloading

    device = torch.accelerator.current_accelerator()

    def update(worker: object) -> None:
        model = worker.model_runner.model
        streams = (torch.Stream(device=device), torch.Stream(device=device))
        with restore_for_reloading(model):
            for number in range(0, len(weights), 3):
                with streams[number // 3 % 2]:
                    some = weights[number : number + 3]
                    model.load_weights([(n, t.pin_memory().to(device, non_blocking=True)) for n, t in some])

    lab.rpc(update)


ON_A_FULL_CARD: dict[str, Callable[[roads.Lab, roads.Weights], None]] = {
    "host iterator": host_iterator,
    "device iterator": device_iterator,
    "chunks on two streams": chunks_on_two_streams,
    "live push": roads.tensor_by_tensor,
    "buckets, then processing": roads.buckets_then_processing,
}


def largest_layer(model: torch.nn.Module) -> int:
    """Bytes of the largest module that owns parameters."""
    sizes = [sum(p.nbytes for p in module.parameters(recurse=False)) for module in model.modules()]
    return max(sizes)


@pytest.fixture(scope="module", params=["graphs", "fp8"])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[roads.Lab]:
    """An engine with a large model, whose KV cache has what vLLM gives it."""
    case = case_named("llama")
    options = {"enforce_eager": False, "kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.92}
    options |= FP8 if request.param == "fp8" else {}
    case = dataclasses.replace(with_options(case, **options), config=dict(case.config) | LARGE)
    with roads.lab_of(case, tmp_path_factory.mktemp("checkpoints")) as one:
        yield one


@pytest.mark.parametrize("road", [*ON_A_FULL_CARD, "folder"])
def test_reloads_on_a_full_card(full: roads.Lab, road: str, tmp_path: Path) -> None:
    weights = sum(parameter.nbytes for parameter in full.model.parameters())
    for letter in "BA":
        with filled(int(SPARE * weights)), Peak() as peak:
            if road == "folder":
                oracle.reload_from_folder(full.llm, full.folders[letter])
            else:
                ON_A_FULL_CARD[road](full, full.weights[letter])
        assert full.difference(letter) == ""
        assert peak.extra <= largest_layer(full.model) + BEYOND
        assert full.rpc(lambda worker: worker.reload_status())["report"]["spilled_bytes"] == 0


def test_kernel_format_on_a_full_card(full: roads.Lab) -> None:
    """One tensor at a time on the device."""
    sent: dict[str, roads.Weights] = {}
    for letter in "BA":
        oracle.reload_from_folder(full.llm, full.folders[letter])
        sent[letter] = [(name, tensor.detach().cpu()) for name, tensor in full.model.named_parameters()]
    weights = sum(parameter.nbytes for parameter in full.model.parameters())

    def push(worker: object, pairs: roads.Weights) -> None:
        weights = on_device(pairs)
        worker.model_runner.reload_weights(weights_iterator=weights, is_checkpoint_format=False)

    for letter in "BA":
        with filled(int(SPARE * weights)):
            full.rpc(lambda worker, pairs=sent[letter]: push(worker, pairs))
        assert full.difference(letter) == ""


# --- sleep ---


@pytest.fixture(scope="module", params=["llama_tied", "mixtral"])
def sleeper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[roads.Lab]:
    """An engine that sleeps, with graphs: their memory stays mapped at the addresses it had."""
    case = with_options(case_named(request.param), **MODES["graphs"], enable_sleep_mode=True)
    with roads.lab_of(case, tmp_path_factory.mktemp("checkpoints")) as one:
        yield one


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "push", [roads.tensor_by_tensor, roads.buckets_then_processing, roads.chunks_and_nameless_loads]
)
def test_a_step_with_sleep_gives_the_engine_of_a_cold_start(
    sleeper: roads.Lab, push: Callable[[roads.Lab, roads.Weights], None], level: int
) -> None:
    for letter in "BA":
        sleeper.llm.sleep(level=level)
        sleeper.llm.wake_up(tags=["weights"])
        push(sleeper, sleeper.weights[letter])
        sleeper.llm.wake_up(tags=["kv_cache"])
        assert sleeper.difference(letter) == ""
