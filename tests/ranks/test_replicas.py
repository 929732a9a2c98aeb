"""A server of two replicas: the command line reaches both, and half of a push to one is served by neither."""

import contextlib
import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from reload_plugin.cli import main
from tests import oracle
from tests.vllm_hooks.test_worker_and_server import environment, wait_until_healthy, write_tokenizer
from tests.zoo import case_named

pytestmark = [pytest.mark.alone, pytest.mark.slow]

CASE = case_named("llama_tied")
REPLICAS = 2


class Server:
    """A server of two replicas, asked by the command line and by requests."""

    def __init__(self, url: str, folders: dict[str, Path]) -> None:
        self.url, self.folders = url, folders

    def command(self, *arguments: str | Path, code: int = 0) -> str:
        """What a command prints; it has to end with this exit code."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            found = main(list(map(str, arguments)))
        assert found == code, said.getvalue()
        return said.getvalue()

    def told(self) -> list[tuple[int, int, str]]:
        """Replica, version and digest of each rank, as `status` says."""
        states = json.loads(self.command("status", self.url, "--json"))
        return [(state["replica"], state["version"], state["digest"]) for state in states]

    def call(self, method: str, *arguments: object) -> None:
        """Of every worker of both replicas."""
        body = {"method": method, "args": arguments}
        httpx.post(f"{self.url}/collective_rpc", json=body, timeout=60).raise_for_status()

    def answers(self) -> list[list]:
        """Greedy tokens and logprobs of each replica."""
        body = {"model": "policy", "prompt": oracle.PROMPTS[0], "max_tokens": 8, "temperature": 0}
        body |= {"logprobs": 1, "ignore_eos": True}
        found = []
        for replica in range(REPLICAS):
            headers = {"X-data-parallel-rank": str(replica)}
            answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)
            said = answer.raise_for_status().json()["choices"][0]["logprobs"]
            found.append([said["tokens"], said["token_logprobs"]])
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("replicas")
    folders = oracle.write(CASE, work)
    for folder in folders.values():
        write_tokenizer(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folders["A"])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "bfloat16"]
    command += ["--max-model-len", "96", "--max-num-seqs", "4", "--no-enable-prefix-caching"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "policy"]
    command += ["--data-parallel-size", str(REPLICAS), "--worker-extension-cls", "tests.replicas.Worker"]
    variables = environment(
        VLLM_SERVER_DEV_MODE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        OMP_WAIT_POLICY="PASSIVE",
        TORCHDYNAMO_DISABLE="1",
    )
    log = work / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=variables) as process:
        try:
            wait_until_healthy(port, process, log)
            yield Server(f"http://127.0.0.1:{port}", folders)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def test_the_command_line_reaches_both_replicas_and_tells_them_apart(server: Server) -> None:
    on_a, started = server.answers(), server.told()
    assert [state[0] for state in started] == [0, 1]
    assert started[0][2] == started[1][2]
    said = server.command("push", server.folders["B"], "--url", server.url)
    on_b, now = server.answers(), server.told()
    assert on_b[0] == on_b[1] != on_a[0] == on_a[1]
    assert [state[1] for state in now] == [state[1] + 1 for state in started]
    assert now[0][2] == now[1][2] != started[0][2]
    assert said.count(now[0][2]) == REPLICAS, said
    for replica in range(REPLICAS):
        server.call("fail_once", replica)
        failed = server.command("push", server.folders["A"], "--url", server.url, code=2)
        assert f"replica {replica}" in failed
        assert "the disk is gone" in failed
        assert server.told() == now
        assert server.answers() == on_b
    server.command("push", server.folders["A"], "--url", server.url)
    assert server.answers() == on_a


def test_half_of_a_push_to_one_replica_is_served_by_neither(server: Server) -> None:
    """Of a push whose names came before. Requests come in between; the other half then changes that replica
    alone, which `status` shows.
    """
    folder = server.folders["B"]
    server.command("push", folder, "--url", server.url)
    on_b, of_b = server.answers(), server.told()[0][2]
    server.call("push_all", str(server.folders["A"]))
    on_a, before = server.answers(), server.told()
    for half in range(2):
        assert server.answers() == on_a
        assert server.told() == before
        server.call("push_half", 0, str(folder), half)
    assert server.answers() == [on_b[0], on_a[1]]
    first, second = server.told()
    assert first[2] == of_b
    assert second == before[1]
    server.command("push", folder, "--url", server.url)
    assert server.answers() == on_b
    assert [state[2] for state in server.told()] == [of_b] * REPLICAS
