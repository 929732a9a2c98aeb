"""Chunked weight updates of an engine that goes on serving: over HTTP under traffic, and in this process."""

import contextlib
import http.client
import itertools
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import reload_plugin
from reload_plugin import abort_weight_update, vllm_api
from reload_plugin.commit.group_commit import Commit
from reload_plugin.errors import MissingWeightsError, SessionError, SourceError
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.vllm_hooks import plugin
from reload_plugin.vllm_hooks import transfer_engine as transfer
from tests import oracle
from tests.checkpoints import read_tensors
from tests.processor import packs_with_amx
from tests.vllm_hooks.test_worker_and_server import environment, wait_until_healthy, write_tokenizer
from tests.zoo import LLAMA_TIED, case_named

# Large enough that a whole reload takes longer than a token.
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
CASE = replace(case_named("llama_tied"), name="serving", config=LLAMA_TIED | SIZES)
TOKENS = 8
UPDATES = 20
CLIENTS = 3
CHUNKS = 3
ABORTED = 10
"""The update that starts with one that fails after some chunks."""
PROJECTIONS = 4 * SIZES["num_hidden_layers"]
"""Layers that processing packs: qkv, o, gate and up, down."""
TRANSFER = {"backend": transfer.BACKEND}

Answer = tuple[tuple[str, ...], tuple[float, ...]]
"""Tokens and the logprob of each."""
Booting = tuple[int, subprocess.Popen, Path]
"""Port, process and log of a server that is starting."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = oracle.write(CASE, tmp_path_factory.mktemp("serving"))
    for folder in found.values():
        write_tokenizer(folder)
    return found


@pytest.fixture(scope="module")
def chunks(folders: dict[str, Path]) -> list[list[str]]:
    """Names of a checkpoint in `CHUNKS` parts that cut through layers and fused parameters."""
    names = sorted(read_tensors(folders["A"]))
    return [names[part::CHUNKS] for part in range(CHUNKS)]


@pytest.fixture(scope="module")
def booting(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booting]:
    """A server on A with the routes for weight updates. It starts while the engine below does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folders["A"])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "bfloat16"]
    command += ["--max-model-len", "96", "--max-num-seqs", "4", "--no-enable-prefix-caching"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "policy"]
    command += ["--weight-transfer-config", json.dumps(TRANSFER)]
    variables = environment(VLLM_SERVER_DEV_MODE="1", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=variables) as process:
        try:
            yield port, process, log
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:  # its engine hangs
                process.kill()


# --- an engine in this process ---


@pytest.fixture(scope="module")
def llm(folders: dict[str, Path], booting: Booting) -> Iterator:
    """Started on B, while the server boots."""
    with oracle.running(CASE, folders["B"], weight_transfer_config=TRANSFER) as engine:
        yield engine


@pytest.fixture(scope="module")
def cold_b(llm: object) -> list[Answer]:
    return answers(llm)


def answers(llm: object) -> list[Answer]:
    """One prompt after the other, in the form in which a server answers."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=1)
    found = []
    for prompt in oracle.PROMPTS:
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0]
        logprobs = [oracle.plain(position) for position in output.logprobs]
        chosen = tuple(position[token] for position, token in zip(logprobs, output.token_ids, strict=True))
        found.append((tuple(f"t{token}" for token in output.token_ids), chosen))
    return found


def send(llm: object, folder: Path, names: list[str] | None = None) -> None:
    llm.update_weights({"update_info": {"path": str(folder)} | ({"names": names} if names else {})})


def update(llm: object, folder: Path, chunks: list[list[str]]) -> None:
    llm.start_weight_update()
    for names in chunks:
        send(llm, folder, names)
    llm.finish_weight_update()


BAD = {
    "an unknown key": ({"path": "A", "name": ["x"]}, "unknown keys: name. It has to be"),
    "no path": ({"names": ["x"]}, "has no path"),
    "a path that is no text": ({"path": 7}, "has no path, or one that is not text"),
    "names that are text": ({"path": "A", "names": "lm_head"}, "names in update_info is not a list"),
    "no such path": ({"path": "/nowhere/at/all"}, "There is no folder /nowhere/at/all"),
    "a name that is not there": ({"path": "A", "names": ["y", "x"]}, "does not hold x, y"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_chunk_ends_the_update_and_the_old_weights_are_served(
    what: str, llm: object, cold_b: list[Answer], folders: dict[str, Path], chunks: list[list[str]]
) -> None:
    info, message = BAD[what]
    info = info | ({"path": str(folders["A"])} if info.get("path") == "A" else {})
    llm.start_weight_update()
    send(llm, folders["A"], chunks[0])
    with pytest.raises(SourceError, match="The engine serves what it served before") as caught:
        llm.update_weights({"update_info": info})
    assert message in str(caught.value)
    assert state_of(oracle.model_of(llm)).update is None, "the update was not ended"
    assert answers(llm) == cold_b
    with pytest.raises(RuntimeError, match="start_weight_update must be called"):
        send(llm, folders["A"])


def test_an_update_in_chunks_and_one_at_once(
    llm: object, cold_b: list[Answer], folders: dict[str, Path], chunks: list[list[str]]
) -> None:
    update(llm, folders["A"], chunks)
    assert all(a != b for a, b in zip(answers(llm), cold_b, strict=True))
    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": str(folders["B"])}})
    llm.finish_weight_update()
    assert answers(llm) == cold_b


def test_a_chunk_without_an_open_update_does_not_touch_the_served_weights(
    llm: object, cold_b: list[Answer], folders: dict[str, Path], chunks: list[list[str]]
) -> None:
    """Whatever vLLM's worker believes: here it still counts the update as active."""
    llm.start_weight_update()
    abort_weight_update(oracle.model_of(llm))
    with pytest.raises(SessionError, match="No weight update is open"):
        send(llm, folders["A"], chunks[0])
    assert answers(llm) == cold_b
    update(llm, folders["B"], chunks)
    assert answers(llm) == cold_b


# --- the calls below every transfer engine ---


@pytest.fixture
def model(llm: object, cold_b: list[Answer]) -> Iterator[torch.nn.Module]:
    """The model of the engine, which serves B again afterwards."""
    found = oracle.model_of(llm)
    yield found
    abort_weight_update(found)
    assert answers(llm) == cold_b


def test_a_second_start_says_who_holds_the_update(model: torch.nn.Module, folders: dict[str, Path]) -> None:
    vllm_api.initialize_layerwise(model)
    model.load_weights(iter(read_tensors(folders["A"]).items()))
    with pytest.raises(SessionError, match=r"A weight update is open: .* weights so far"):
        vllm_api.initialize_layerwise(model)


def test_a_finish_that_fails_leaves_an_update_that_can_be_finished(
    llm: object, model: torch.nn.Module, folders: dict[str, Path], chunks: list[list[str]]
) -> None:
    on_b = answers(llm)
    llm.start_weight_update()
    for names in chunks[:-1]:
        send(llm, folders["A"], names)
    with pytest.raises(MissingWeightsError):
        llm.finish_weight_update()
    assert answers(llm) == on_b
    send(llm, folders["A"], chunks[-1])
    llm.finish_weight_update()
    assert answers(llm) != on_b
    update(llm, folders["B"], chunks)


def test_a_finish_that_fails_leaves_an_update_that_can_be_ended(
    llm: object, model: torch.nn.Module, folders: dict[str, Path], chunks: list[list[str]]
) -> None:
    llm.start_weight_update()
    send(llm, folders["A"], chunks[0])
    with pytest.raises(MissingWeightsError):
        llm.finish_weight_update()
    with pytest.raises(SourceError):
        send(llm, folders["A"] / "nothing")
    update(llm, folders["B"], chunks)


def test_the_pause_is_the_finish_and_the_report_gives_it(
    llm: object,
    model: torch.nn.Module,
    folders: dict[str, Path],
    chunks: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers are processed while the chunks come, beside the old weights, and not in the pause."""
    process, apply, done = vllm_api.process_layers, Commit.apply, []

    def processing(original: object, layers: list, *others: object) -> None:
        done.extend(name for name, _ in layers)
        process(original, layers, *others)

    def applying(commit: Commit) -> None:
        done.append("a commit")
        apply(commit)

    on_b, digest = answers(llm), reload_plugin.status(model)[0].digest
    monkeypatch.setattr(vllm_api, "process_layers", processing)
    monkeypatch.setattr(Commit, "apply", applying)
    llm.start_weight_update()
    for names in chunks:
        send(llm, folders["A"], names)
    before = done.copy()
    assert len([name for name in before if name.endswith("_proj")]) == PROJECTIONS
    assert answers(llm) == on_b
    llm.finish_weight_update()
    finishing = done[len(before) :]
    assert "a commit" not in before
    assert set(finishing[finishing.index("a commit") :]) == {"a commit"}, "processed during the commit"
    assert not [name for name in finishing if name.endswith("_proj")]
    report = reload_plugin.status(model)[0].report
    assert report.replayed == report.tensors > 0, "the model's loader takes hundreds of microseconds for each"
    seconds = report.seconds
    assert 0 < seconds["commit"] < seconds["finish"] < seconds["total"]
    update(llm, folders["B"], chunks)
    assert answers(llm) == on_b
    assert reload_plugin.status(model)[0].digest == digest


def test_the_digest_of_what_is_served_can_be_asked_for_in_an_open_update(
    llm: object, model: torch.nn.Module, folders: dict[str, Path], chunks: list[list[str]]
) -> None:
    """What is known of native handles is kept: of those that are served, and of those that will be."""
    found = []
    for letter in "AB":
        update(llm, folders[letter], chunks)
        found.append(reload_plugin.status(llm)[0].digest)
    update(llm, folders["A"], chunks)  # and nobody asks
    llm.start_weight_update()
    for names in chunks[:-1]:
        send(llm, folders["B"], names)
    assert reload_plugin.status(llm, digest=False)[0].digest is None
    found.append(reload_plugin.status(llm)[0].digest)
    send(llm, folders["B"], chunks[-1])
    llm.finish_weight_update()
    assert reload_plugin.status(llm, digest=False)[0].digest is None
    found.append(reload_plugin.status(llm)[0].digest)
    assert found[:2] == found[2:]
    assert None not in found


def test_native_handles_that_are_gone_are_forgotten_though_nobody_asks(
    llm: object, model: torch.nn.Module, folders: dict[str, Path], chunks: list[list[str]]
) -> None:
    handles = state_of(model).handles
    assert reload_plugin.status(llm)[0].digest
    before = len(handles)
    for letter in "ABAB":
        update(llm, folders[letter], chunks)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[letter])})
        assert len(handles) == before


@pytest.mark.usefixtures("model")
def test_a_chunk_that_fails_in_an_engine_of_vllms_ends_the_update(
    llm: object, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an engine raises before a weight arrives, as NCCL does when the trainer is gone."""

    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("the trainer is gone")

    llm.start_weight_update()
    with monkeypatch.context() as patch:
        patch.setattr(transfer.FilesTransfer, "update_weights", broken)
        patch.setattr(transfer.FilesTransfer, "receive_weights", broken)  # what vLLM 0.24 calls
        with pytest.raises(ConnectionError):
            send(llm, folders["A"])
    llm.start_weight_update()
    send(llm, folders["B"])
    llm.finish_weight_update()


# --- registration ---


def test_the_factory_knows_the_engine_only_while_the_plugin_is_registered() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory

    plugin.register()
    engine = WeightTransferEngineFactory._registry[transfer.BACKEND]()
    assert issubclass(engine, WeightTransferEngine)
    assert not engine.__abstractmethods__
    try:
        plugin.unregister()
        assert transfer.BACKEND not in WeightTransferEngineFactory._registry
    finally:
        plugin.register()
    assert WeightTransferEngineFactory._registry[transfer.BACKEND]() is engine


def test_without_a_factory_the_rest_is_patched_and_one_line_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    plugin.unregister()
    monkeypatch.setitem(sys.modules, vllm_api.TRANSFER + ".factory", None)
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *args: lines.append(text % args))
    try:
        plugin.register()
        assert plugin.patched()
        assert [line for line in lines if "no weight-transfer engine 'files'" in line] == lines
        assert len(lines) == 1
    finally:
        plugin.unregister()
        monkeypatch.undo()
        plugin.register()


def test_importing_the_engine_imports_no_part_of_vllm() -> None:
    code = "import sys, reload_plugin.vllm_hooks.transfer_engine as _; "
    code += "print([m for m in sys.modules if m.split('.')[0] == 'vllm'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- a server under traffic ---


@dataclass(frozen=True)
class Server:
    port: int

    def post(self, path: str, body: dict | None = None) -> tuple[int, str]:
        """Status and text of the answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", path, json.dumps(body or {}), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def call(self, path: str, body: dict | None = None) -> None:
        status, text = self.post(path, body)
        assert status == 200, (path, status, text)

    def ask(self, prompt: int) -> Answer:
        body = {
            "model": "policy",
            "prompt": oracle.PROMPTS[prompt],
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
        }
        status, text = self.post("/v1/completions", body)
        assert status == 200, (status, text)
        logprobs = json.loads(text)["choices"][0]["logprobs"]
        return tuple(logprobs["tokens"]), tuple(logprobs["token_logprobs"])


@pytest.fixture(scope="module")
def server(booting: Booting) -> Server:
    wait_until_healthy(*booting)
    return Server(booting[0])


@dataclass(frozen=True)
class Exchange:
    """One request and its answer; times in seconds of `time.monotonic`."""

    prompt: int
    sent: float
    received: float
    answer: Answer


class Traffic:
    """Clients that ask without pause while the block runs. Leaving it raises what a client met."""

    def __init__(self, server: Server) -> None:
        self.seen: list[Exchange] = []
        self._server = server
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._clients = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> "Traffic":
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()
        if self._failures:
            raise self._failures[0]

    def _ask(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                prompt = number % len(oracle.PROMPTS)
                sent = time.monotonic()
                answer = self._server.ask(prompt)
                self.seen.append(Exchange(prompt, sent, time.monotonic(), answer))
                number += 1
        except BaseException as error:  # noqa: BLE001 - raised again where the block ends
            self._failures.append(error)

    def flow(self, count: int = CLIENTS) -> None:
        """Wait until so many requests that were sent after this call have been answered."""
        known, start = len(self.seen), time.monotonic()
        while sum(exchange.sent > start for exchange in self.seen[known:]) < count:
            assert not self._failures, self._failures
            assert time.monotonic() < start + 60, "no answers for a minute"
            time.sleep(0.01)

    def longest_gap(self, start: float, end: float) -> float:
        """Seconds between two answers, whoever got them."""
        times = sorted(exchange.received for exchange in self.seen if start <= exchange.received <= end)
        return max(after - before for before, after in itertools.pairwise(times))


@dataclass(frozen=True)
class Switch:
    """A generation took over some time between `start` and `end`; `finish` is the call alone, in seconds."""

    start: float
    end: float
    generation: str
    finish: float


def commit(server: Server, generation: str) -> Switch:
    """The end of an update, see examples/README.md: requests in flight end on the weights they began with."""
    start = time.monotonic()
    server.call("/pause?mode=wait")
    paused = time.monotonic()
    try:
        server.call("/finish_weight_update", {"weight_version": generation})
        finished = time.monotonic()
    finally:
        server.call("/resume")
    return Switch(start, time.monotonic(), generation, finished - paused)


def stage(server: Server, traffic: Traffic, folder: Path, chunks: list[list[str]]) -> None:
    """An update up to its finish, with requests answered after each chunk."""
    server.call("/start_weight_update")
    for names in chunks:
        server.call("/update_weights", {"update_info": {"path": str(folder), "names": names}})
        traffic.flow()


def fail(server: Server, traffic: Traffic, folder: Path, chunks: list[list[str]]) -> None:
    """An update that gets some chunks and then a bad one."""
    stage(server, traffic, folder, chunks[:-1])
    status, text = server.post(
        "/update_weights", {"update_info": {"path": str(folder), "names": ["nothing"]}}
    )
    assert status == 500
    assert "does not hold nothing" in text
    traffic.flow()
    status, text = server.post("/finish_weight_update")
    assert status == 500
    assert "without a matching start_weight_update" in text


def allowed(exchange: Exchange, switches: list[Switch]) -> set[str]:
    """Generations that may answer: what was served at a moment between sending and receiving."""
    found = {"A"}
    for switch in switches:
        if switch.end <= exchange.sent:
            found = {switch.generation}
        elif switch.start <= exchange.received:
            found |= {switch.generation}
    return found


def test_requests_see_one_generation_in_whole_while_updates_come_in_chunks(
    cold_b: list[Answer], server: Server, folders: dict[str, Path], chunks: list[list[str]]
) -> None:
    if packs_with_amx():
        pytest.skip(
            "vLLM's AMX kernels round by the size of a batch: a generation has no one answer to compare"
        )
    cold = {"A": [server.ask(n) for n in range(len(oracle.PROMPTS))], "B": cold_b}
    assert all(a[0] != b[0] for a, b in zip(cold["A"], cold["B"], strict=True))
    switches: list[Switch] = []
    with Traffic(server) as traffic:
        traffic.flow(20)
        quiet = (traffic.seen[0].received, time.monotonic())
        for number in range(UPDATES):
            generation = "BA"[number % 2]
            if number == ABORTED:
                fail(server, traffic, folders[generation], chunks)
            stage(server, traffic, folders[generation], chunks)
            switches.append(commit(server, generation))
            traffic.flow()
        busy = (quiet[1], time.monotonic())

    wrong = [e for e in traffic.seen if e.answer not in [cold[g][e.prompt] for g in allowed(e, switches)]]
    assert not wrong, f"{len(wrong)} of {len(traffic.seen)} answers are not of one generation: {wrong[0]}"
    for generation, expected in cold.items():
        assert sum(e.answer == expected[e.prompt] for e in traffic.seen) > UPDATES * CHUNKS, generation
    sure = [e for e in traffic.seen if len(allowed(e, switches)) == 1]
    assert len(sure) > len(traffic.seen) / 2, "too few answers of which the generation is known"

    reloads = [timed_reload(server, folders["B"]) for _ in range(3)]
    print(
        f"\n{len(traffic.seen)} answers; longest gap between two {milliseconds(traffic.longest_gap(*quiet))} "
        f"before and {milliseconds(traffic.longest_gap(*busy))} during {UPDATES} updates. Medians: commit "
        f"{milliseconds(*(s.finish for s in switches))}, with its pause "
        f"{milliseconds(*(s.end - s.start for s in switches))}; whole reload {milliseconds(*reloads)}."
    )
    assert [server.ask(n) for n in range(len(oracle.PROMPTS))] == cold["B"]


def timed_reload(server: Server, folder: Path) -> float:
    start = time.monotonic()
    server.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
    return time.monotonic() - start


def milliseconds(*seconds: float) -> str:
    """The median."""
    return f"{statistics.median(seconds) * 1e3:.0f} ms"
