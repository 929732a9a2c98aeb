"""``push`` to several servers: all of them commit, or none does.

The servers are threads with models of their own; what they answer comes from this package's own calls, and
the votes go over a real store. vLLM's real server is in `test_cli`.
"""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from reload_plugin import reload_weights
from reload_plugin.cli import main
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.status import status_of
from tests.transaction.test_session import (
    A,
    B,
    Model,
    Packing,
    cold,
    registered,  # noqa: F401 - the fixture is used by itself
    values,
)


class Engine(http.server.ThreadingHTTPServer):
    """The routes of vLLM's server that a push needs, around one model."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.model = cold(lambda: Model(Packing), A)
        self.fails = ""
        self.slow = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reload_status(self, digest: bool = True) -> dict:
        return status_of(self.model, digest).model_dump(mode="json")

    def reload_weights(self, weights_path: str, **how: object) -> None:
        if self.fails == "before":
            raise ValueError("no such worker")
        time.sleep(self.slow)
        path = "/nowhere" if self.fails == "source" else weights_path
        reload_weights(self.model, weights_path=path, **how)

    @property
    def version(self) -> int:
        return state_of(self.model).generation.version


class Routes(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        answer, code = {}, 200
        if self.path == "/collective_rpc":
            try:
                answer = {"results": [getattr(self.server, body["method"])(**body["kwargs"])]}
            except Exception as error:  # noqa: BLE001 - as the route does
                answer, code = {"error": {"message": str(error)}}, 500
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *said: object) -> None:
        """Nothing."""


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    started = [Engine() for _ in range(3)]
    yield started
    for engine in started:
        engine.shutdown()
        engine.server_close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    save_file(B, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def push(checkpoint: str, engines: list[Engine], *more: str) -> int:
    return main(["push", checkpoint, *(engine.url for engine in engines), *more])


def test_all_commit(engines: list[Engine], checkpoint: str, capsys: pytest.CaptureFixture) -> None:
    engines[1].slow = 1.0
    assert push(checkpoint, engines, "--version", "step 7") == 0
    said = capsys.readouterr().out
    wanted = values(cold(lambda: Model(Packing), B))
    for engine in engines:
        assert values(engine.model) == wanted
        assert engine.url in said
    assert said.count("version 1, step 7, digest ") == 3
    assert push(checkpoint, engines, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [told[engine.url][0]["version"] for engine in engines] == [2, 2, 2]


@pytest.mark.parametrize("fails", ["before", "source"])
def test_one_that_fails_leaves_all_on_the_old_weights(
    engines: list[Engine], checkpoint: str, fails: str, capsys: pytest.CaptureFixture
) -> None:
    """Before its reload, so that it never votes; or in it."""
    wanted = [values(engine.model) for engine in engines]
    engines[2].fails = fails
    started = time.monotonic()
    assert push(checkpoint, engines) == 2
    assert time.monotonic() - started < 10
    said = capsys.readouterr().err
    assert engines[2].url in said
    assert ("no such worker" if fails == "before" else "/nowhere") in said
    assert "No server took the weights" in said
    assert [values(engine.model) for engine in engines] == wanted
    assert [engine.version for engine in engines] == [0, 0, 0]
    engines[2].fails = ""
    assert push(checkpoint, engines) == 0
    assert [engine.version for engine in engines] == [1, 1, 1]


def test_one_that_hangs_is_named_after_the_time_that_was_given(
    engines: list[Engine], checkpoint: str, capsys: pytest.CaptureFixture
) -> None:
    engines[0].slow = 4.0
    started = time.monotonic()
    assert push(checkpoint, engines, "--timeout", "1") == 2
    assert time.monotonic() - started < 10
    assert engines[0].url in capsys.readouterr().err
    time.sleep(5)
    assert [engine.version for engine in engines] == [0, 0, 0], "the late one committed alone"


def test_what_cannot_be_asked_is_told_before_anything_is_touched(
    engines: list[Engine], checkpoint: str, capsys: pytest.CaptureFixture
) -> None:
    assert push(checkpoint, engines, "http://127.0.0.1:9") == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert push(checkpoint, [engines[0], engines[0]]) == 2
    assert "twice" in capsys.readouterr().err
    assert push(checkpoint, engines, "--chunk-mib", "1") == 2
    assert "one server" in capsys.readouterr().err
    assert push(checkpoint, engines, "--policy", "streaming") == 2
    assert "can commit together" in capsys.readouterr().err
    assert [engine.version for engine in engines] == [0, 0, 0]
