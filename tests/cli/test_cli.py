"""Every command of ``reload-plugin`` on real files and a real server: what it says, and its exit code."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import torch
from safetensors.torch import save_file

from reload_plugin import convert, vllm_api
from reload_plugin.cli import main
from reload_plugin.cli import server as remote
from reload_plugin.vllm_api import seams
from reload_plugin.vllm_hooks import transfer_engine as transfer
from tests import oracle
from tests.checkpoints import read_tensors
from tests.vllm_hooks.test_worker_and_server import environment, wait_until_healthy, write_tokenizer
from tests.zoo import case_named

CASE = case_named("llama_tied")
KEY = "secret"
PROMPT = oracle.PROMPTS[1]


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(capfd: pytest.CaptureFixture) -> Run:
    """Run a command in this process."""

    def command(*arguments: object) -> Said:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capfd.readouterr())

    return command


def test_without_its_libraries_the_command_line_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("reload_plugin.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    said = run("doctor")
    assert said.code == 2
    assert "pip install typer rich httpx" in said.err


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = oracle.write(CASE, tmp_path_factory.mktemp("cli"))
    for folder in found.values():
        write_tokenizer(folder)
    return found


def complaint(said: Said) -> tuple[str, str]:
    """The one line that says what is wrong and the one that says what to do."""
    assert said.code == 2
    assert said.out == ""
    fact, step = said.err.rstrip("\n").split("\n")[-2:]
    assert fact.startswith("reload-plugin: ")
    assert step.startswith("  next: ")
    assert "Traceback" not in said.err
    return fact, step


# --- inspect ---


def test_inspect_tells_what_is_in_a_checkpoint(run: Run, folders: dict[str, Path]) -> None:
    tensors = read_tensors(folders["A"])
    said = run("inspect", folders["A"], "--json", "--tensors")
    found = said.json
    assert said.code == 0
    assert (found["format"], found["tensors"], found["layers"]) == ("safetensors", len(tensors), 2)
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["dtypes"] == {"bfloat16": {"tensors": len(tensors), "bytes": found["bytes"]}}
    assert found["by_layer"]["model.layers.0"]["tensors"] == 9
    assert {name: tuple(t["shape"]) for name, t in found["by_tensor"].items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    plain = run("inspect", folders["A"])
    assert f"{len(tensors)} tensors" in plain.out
    assert "model.layers.1" in plain.out


def test_inspect_tells_where_a_converted_file_came_from(run: Run, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")
    assert run("inspect", tmp_path / "out", "--json").json["converted_from"] == str(tmp_path / "a.pt")


def test_what_cannot_be_read_is_told_in_one_line_with_a_next_step(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"no safetensors at all")
    fact, step = complaint(run("inspect", tmp_path / "bad.safetensors"))
    assert "bad.safetensors is not a whole safetensors file" in fact
    assert "Write or copy the file again" in step
    complaint(run("inspect", tmp_path / "nowhere"))
    complaint(run("inspect", tmp_path))
    assert "Traceback" in run("inspect", tmp_path / "nowhere", "--debug").err


# --- diff ---


def test_diff_has_the_exit_codes_of_diff(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    assert run("diff", folders["A"], folders["A"]).code == 0
    assert run("diff", folders["A"], folders["B"]).code == 1
    complaint(run("diff", folders["A"], tmp_path / "nowhere"))


def test_diff_counts_elements_that_changed_in_any_bit(run: Run, tmp_path: Path) -> None:
    one = {
        "same": torch.tensor([float("nan"), -0.0, 1.0]),
        "some": torch.arange(10.0),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "shape": torch.zeros(2, 3),
        "dtype": torch.zeros(2, dtype=torch.float32),
        "gone": torch.zeros(1),
        "none": torch.zeros(0, 3),
    }
    other = {name: tensor.clone() for name, tensor in one.items()}
    other["some"][3] += 1
    other["some"][7] = float("nan")
    other["bytes"][0] = 9
    other["complex"][1] = 1j
    other |= {"shape": torch.zeros(3, 2), "dtype": torch.zeros(2, dtype=torch.float16), "new": torch.zeros(1)}
    del other["gone"]
    save_file(one, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    said = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    found = said.json
    assert said.code == 1
    assert (found["only_in_a"], found["only_in_b"]) == (["gone"], ["new"])
    assert found["shapes"] == {"shape": [[2, 3], [3, 2]]}
    assert found["dtypes"] == {"dtype": ["float32", "float16"]}
    assert {name: change["elements"] for name, change in found["changed"].items()} == {
        "some": 2,
        "bytes": 1,
        "complex": 1,
    }
    assert (found["changed_elements"], found["compared_elements"]) == (4, 20)
    assert found["changed_share"] == pytest.approx(0.2)
    plain = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors").out
    for text in (
        "only in A",
        "only in B",
        "shape [2, 3] -> [3, 2]",
        "float32 -> float16",
        "2 elements changed (20.00%)",
    ):
        assert text in plain
    headers = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--headers", "--json")
    assert (headers.code, headers.json["changed"], headers.json["compared_elements"]) == (1, {}, 0)


# --- convert ---


def test_convert_once_again_and_only_when_stale(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save({"model": {"w": torch.ones(2)}, "step": 1}, source)
    said = run("convert", source, target, "--json")
    assert (said.code, said.json["tensors"], said.json["converted"]) == (0, 1, True)
    fact, step = complaint(run("convert", source, target))
    assert "exists already" in fact
    assert "overwritten" in step
    assert run("convert", source, target, "--if-stale", "--json").json["converted"] is False
    torch.save({"model": {"w": torch.zeros(3)}, "step": 2}, source)
    assert run("convert", source, target, "--if-stale", "--json").json["converted"] is True
    assert run("inspect", target, "--json").json["elements"] == 3


def test_convert_if_stale_keeps_the_users_files_in_the_target(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "out"
    torch.save({"w": torch.ones(2)}, source)
    run("convert", source, target)
    (target / "notes.txt").write_text("mine")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("mine too")
    torch.save({"w": torch.zeros(3)}, source)
    assert run("convert", source, target, "--if-stale", "--json").json["converted"] is True
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "runs" / "log").read_text() == "mine too"
    assert run("inspect", target, "--json").json["elements"] == 3


# --- plan ---


def test_plan_tries_a_checkpoint_on_a_model_without_an_engine(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The model's folder has only a config; the second checkpoint lacks, adds and bends weights."""
    config = tmp_path / "config"
    config.mkdir()
    shutil.copyfile(folders["A"] / "config.json", config / "config.json")
    said = run("plan", folders["B"], config, "--json")
    assert (said.code, said.json["fits"], said.json["architecture"]) == (0, True, "LlamaForCausalLM")
    tensors = read_tensors(folders["B"])
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(7, dtype=torch.bfloat16)
    tensors["unknown.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "bad.safetensors")
    said = run("plan", tmp_path / "bad.safetensors", folders["A"])
    assert said.code == 1
    assert "does not fit LlamaForCausalLM" in said.out
    for text in ("model.layers.1.self_attn.qkv_proj.weight", "unknown.weight", "model.norm.weight"):
        assert text in said.out


def test_plan_leaves_nothing_on_meta_for_the_next_model_of_the_process(
    run: Run, folders: dict[str, Path]
) -> None:
    """vLLM keeps rotary embeddings; an engine started here later would get one without values."""
    rotary = vllm_api.get("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT")
    rotary.clear()
    assert run("plan", folders["B"], folders["A"]).code == 0
    assert not rotary


def test_plan_says_when_there_is_no_such_model(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    complaint(run("plan", folders["A"], tmp_path / "nowhere"))
    fact, _ = complaint(run("plan", folders["A"], folders["A"], "--engine", "{"))
    assert "--engine is not JSON" in fact


# --- doctor ---


def states(said: Said) -> dict[str, str]:
    return {finding["what"]: finding["state"] for finding in said.json["findings"]}


def test_doctor_finds_nothing_wrong_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RELOAD_PLUGIN", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    said = run("doctor", "--json")
    assert (said.code, said.json["ok"]) == (0, True), said.out
    found = states(said)
    assert found["vllm"] == found["entry point"] == found["seams"] == found["patched"] == "ok"
    assert "All is well" in run("doctor").out


def test_doctor_names_switches_that_are_off_and_seams_that_are_gone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELOAD_PLUGIN", "0")
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver,other")
    monkeypatch.setattr(seams, "SEAMS", (*vllm_api.SEAMS, vllm_api.Seam("vllm.config", "gone")))
    said = run("doctor")
    assert said.code == 1
    assert "missing: vllm.config.gone" in said.out
    for step in ("Unset RELOAD_PLUGIN.", "Add reload_plugin to VLLM_PLUGINS, or unset it."):
        assert step in said.out


def test_doctor_says_by_which_road_frameworks_push_and_what_becomes_of_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("trl", "modelexpress"):
        dist = tmp_path / f"{name}-1.2.3.dist-info"
        dist.mkdir()
        (dist / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = {finding["what"]: finding["found"] for finding in run("doctor", "--json").json["findings"]}
    assert said["TRL"].startswith("1.2.3: colocated: model.load_weights on the served model: one update")
    assert "left alone" in said["ModelExpress"]
    assert "OpenRLHF" not in said
    assert "all or nothing" in said["live pushes"]
    assert vllm_api.name_of(vllm_api.minor_of(vllm_api.version())) in said["seams"]
    monkeypatch.setenv("RELOAD_PLUGIN_LIVE", "0")
    said = {finding["what"]: finding["found"] for finding in run("doctor", "--json").json["findings"]}
    assert "stays vLLM's own" in said["live pushes"]


def test_doctor_knows_the_torchvision_trap(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torchvision of another build, as far as a test can have one: installed, and its import fails."""
    dist = tmp_path / "torchvision-0.28.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said = run("doctor", "--json")
    (found,) = [finding for finding in said.json["findings"] if finding["what"] == "torchvision"]
    assert (said.code, found["state"]) == (1, "wrong")
    assert "operator torchvision::nms does not exist" in found["found"]
    assert found["step"].startswith("pip uninstall torchvision")


# --- usage ---


def test_help_has_examples_and_exit_codes(run: Run) -> None:
    said = run("--help")
    assert (said.code, "Exit codes: 0 done" in said.out) == (0, True)
    for command in ("inspect", "diff", "convert", "save", "plan", "push", "status", "doctor"):
        assert command in said.out
        told = run(command, "--help")
        assert told.code == 0
        assert f"reload-plugin {command}" in told.out.split("Examples:")[1]


def test_wrong_usage_is_trouble(run: Run) -> None:
    assert run("nonsense").code == 2
    assert run("diff", "one").code == 2
    assert run("push", "x", "--pause", "sometimes").code == 2


def test_the_installed_command_and_a_reader_that_goes_away(folders: dict[str, Path]) -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", "reload_plugin.cli", "inspect", str(folders["A"]), "--json"]
    out = subprocess.run(
        f"{' '.join(command)} | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        timeout=60,
    )
    assert (out.stdout, "Traceback" in out.stderr) == ("{", False)


# --- a server ---


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that wants a key and has none of our routes."""

    def do_POST(self) -> None:
        self.send_error(404 if self.headers["Authorization"] == f"Bearer {KEY}" else 401)

    def log_message(self, *args: object) -> None:
        """Silence."""


def test_a_server_that_cannot_be_reloaded_says_why(
    run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    fact, step = complaint(run("status", "http://127.0.0.1:9"))
    assert "No server answers at http://127.0.0.1:9" in fact
    assert "Start it" in step
    complaint(run("status", "ftp://somewhere"))
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        fact, step = complaint(run("status", url))
        assert "HTTP 401" in fact
        assert "--api-key" in step
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        _, step = complaint(run("push", folders["A"], "--url", url))
        other.shutdown()
    assert "VLLM_SERVER_DEV_MODE=1" in step


SERVING = {
    "state": "serving",
    "version": 1,
    "weight_version": None,
    "digest": None,
    "source": "the engine's start",
    "since": 0,
    "update": None,
    "last_error": "not now",
}


class Pausing(http.server.BaseHTTPRequestHandler):
    """A server that pauses, fails to reload, and resumes at the third request only, or never."""

    asked: ClassVar[list[str]] = []
    resumes_at = 3

    def do_POST(self) -> None:
        route = self.path.partition("?")[0].strip("/")
        self.asked.append(route)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        answer, code = {}, 200
        if body.get("method") == "reload_status":
            answer = {"results": [SERVING]}
        elif route == "collective_rpc" or (
            route == "resume" and self.asked.count("resume") < self.resumes_at
        ):
            answer, code = {"error": "not now"}, 503
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.mark.parametrize("resumes_at", [1, 3, 1000])
def test_a_paused_server_that_does_not_resume_at_once_is_asked_again(
    run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, resumes_at: int
) -> None:
    """Newer servers refuse requests while they are paused: nobody may leave one so without a word."""
    monkeypatch.setattr(remote, "RESUME_AGAIN", 0.01)
    monkeypatch.setattr(Pausing, "asked", [])
    monkeypatch.setattr(Pausing, "resumes_at", resumes_at)
    with http.server.HTTPServer(("127.0.0.1", 0), Pausing) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        fact, step = complaint(run("push", folders["A"], "--url", url))
        other.shutdown()
    if resumes_at > 3:
        assert "is still paused" in fact
        assert f"curl -X POST {url}/resume" in step
    else:
        assert Pausing.asked.count("resume") == resumes_at
        assert "not now" in fact


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's server, on what ``convert`` made of checkpoint A, with a key."""
    work = tmp_path_factory.mktemp("server")
    convert(folders["A"], work / "converted", max_file_bytes=200_000)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(work / "converted")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "bfloat16"]
    command += ["--max-model-len", "96", "--max-num-seqs", "4", "--served-model-name", "policy"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--api-key", KEY]
    command += ["--enable-prefix-caching", "--block-size", "32", "--enable-prompt-tokens-details"]
    command += ["--weight-transfer-config", json.dumps({"backend": transfer.BACKEND})]
    variables = environment(VLLM_SERVER_DEV_MODE="1", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    log = work / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=variables) as process:
        try:
            wait_until_healthy(port, process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def tokens(url: str, cached: int | None = None) -> list:
    """Greedy tokens and logprobs after a prompt of more than one block; `cached` tokens of it were known."""
    assert len(PROMPT) > 32
    body = {"model": "policy", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(
        f"{url}/v1/completions", json=body | {"ignore_eos": True}, headers=headers, timeout=60
    )
    said = answer.raise_for_status().json()
    details = said["usage"]["prompt_tokens_details"] or {"cached_tokens": 0}
    assert cached is None or details["cached_tokens"] == cached
    choice = said["choices"][0]["logprobs"]
    return [choice["tokens"], choice["token_logprobs"]]


def test_a_server_is_pushed_to_and_says_what_it_serves(
    run: Run, server: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    on_a = tokens(server, cached=0)
    (state,) = run("status", server, "--json").json
    assert (state["state"], state["version"]) == ("serving", 0)

    said = run("push", folders["B"], "--url", server, "--version", "step 12", "--digest", "--json")
    assert said.code == 0, said.err
    (state,) = said.json
    assert (state["version"], state["weight_version"], len(state["digest"])) == (1, "step 12", 32)
    on_b = tokens(server, cached=0)
    assert on_b != on_a, "the weights are the same, or the prefix cache is the old one"

    tensors = read_tensors(folders["A"])
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "bad.safetensors")
    fact, step = complaint(run("push", tmp_path / "bad.safetensors", "--url", server))
    assert "model.norm.weight" in fact
    assert "status" in step
    assert tokens(server) == on_b
    said = run("status", server, "--api-key", KEY)
    assert (said.code, "step 12" in said.out, "last error" in said.out) == (0, True, True)
    assert "replayed, 0 computed by the model's loader" in said.out

    for bad in ("/nowhere/at/all", "relative/nowhere"):
        complaint(run("push", bad, "--url", server))
    said = run("push", folders["A"], "--url", server, "--pause", "none", "--reset-prefix-cache")
    assert (said.code, f"serves {folders['A']}" in said.out) == (0, True), said.err
    assert tokens(server, cached=0) == on_a


def test_a_push_resets_the_prefix_cache_of_a_server_when_asked_and_the_status_says_which(
    run: Run, server: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pause, which would clear it by itself."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    push = ("--url", server, "--pause", "none")
    assert run("push", folders["B"], *push, "--reset-prefix-cache").code == 0
    on_b = tokens(server, cached=0)
    assert run("push", folders["A"], *push).code == 0
    stale = tokens(server, cached=32)
    (state,) = run("status", server, "--json").json
    assert state["report"]["caches"]["prefix"].startswith("not reset by the reload")
    said = run("push", folders["A"], *push, "--reset-prefix-cache", "--json")
    assert said.json[0]["report"]["caches"]["prefix"] == "reset"
    (state,) = run("status", server, "--json").json
    assert state["report"]["caches"]["prefix"] == "reset"
    on_a = tokens(server, cached=0)
    assert stale not in (on_a, on_b), "the stale keys and values answer like the new ones"


def test_a_server_is_pushed_to_in_chunks(
    run: Run, server: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    run("push", folders["A"], "--url", server)
    on_a = tokens(server)
    tensors = read_tensors(folders["B"])
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "bad.safetensors")
    fact, _ = complaint(run("push", tmp_path / "bad.safetensors", "--url", server, "--chunk-mib", "1"))
    assert "model.norm.weight" in fact
    assert tokens(server) == on_a
    said = run("push", folders["B"], "--url", server, "--chunk-mib", "1", "--version", "13", "--json")
    assert said.code == 0, said.err
    assert said.json[0]["state"] == "serving"
    told = httpx.get(f"{server}/weight_info", timeout=30)
    if told.status_code != httpx.codes.NOT_FOUND:  # vLLM 0.24 has no such route
        assert "13" in told.json().values(), told.text
    whole = tokens(server)
    assert whole != on_a
    run("push", folders["B"], "--url", server)
    assert tokens(server) == whole


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("pause", ["wait", "keep", "none"])
def test_what_becomes_of_a_request_that_comes_while_weights_are_pushed(
    run: Run,
    server: str,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    pause: str,
    fails: bool,
) -> None:
    """From vLLM 0.33 on it is refused with 503 unless the pause keeps it. Afterwards all are answered."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    refused = pause == "wait" and vllm_api.minor_of(vllm_api.version()) >= (0, 33)
    own, answers = remote.Server.rpc, []

    def ask() -> None:
        body = {"model": "policy", "prompt": PROMPT, "max_tokens": 4}
        headers = {"Authorization": f"Bearer {KEY}"}
        answers.append(httpx.post(f"{server}/v1/completions", json=body, headers=headers, timeout=60))

    asking = threading.Thread(target=ask)

    def rpc(self: remote.Server, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        if method == "reload_weights":
            asking.start()
            asking.join(60 if refused or pause == "none" else 0.5)
            assert bool(answers) is (refused or pause == "none")
            if fails:
                kwargs["weights_path"] = "/nowhere"
        return own(self, method, *args, **kwargs)

    monkeypatch.setattr(remote.Server, "rpc", rpc)
    assert (run("push", folders["B"], "--url", server, "--pause", pause).code == 0) is not fails
    asking.join(60)
    assert [answer.status_code for answer in answers] == [503 if refused else 200]
    assert tokens(server)


def test_a_server_is_verified_and_exported_over_its_socket(
    run: Run, server: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert run("push", folders["B"], "--url", server).code == 0
    said = run("verify", server, folders["B"], "--json")
    assert (said.code, said.json["serves"]) == (0, True), said.err
    said = run("verify", server, folders["A"], "--json")
    assert (said.code, said.json["serves"]) == (1, False)
    assert len(said.json["different"]) == len(read_tensors(folders["A"]))
    said = run("export", server, tmp_path / "out", "--max-shard-size", "100KB", "--json")
    assert said.code == 0, said.err
    assert len(set(said.json["files"].values())) > 1
    written = read_tensors(tmp_path / "out")
    expected = read_tensors(folders["B"])
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    fact, _ = complaint(run("export", server, tmp_path / "out", "--max-shard-size", "much"))
    assert "max_shard_size" in fact
    fact, _ = complaint(run("verify", server, "/nowhere"))
    assert "/nowhere" in fact


def test_a_server_that_lost_its_weights_answers_with_errors_until_a_push(
    run: Run, server: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request to it is refused and does not end it."""
    from vllm.v1.worker.gpu_worker import Worker

    if not hasattr(Worker, "reset_weights"):
        pytest.skip("this vLLM cannot set weights to zero")
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert run("push", folders["B"], "--url", server).code == 0
    on_b = tokens(server)
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server}/collective_rpc", json={"method": "reset_weights"}, headers=headers)
    assert answer.status_code == 200
    said = run("status", server)
    assert (said.code, "lost" in said.out) == (1, True), said.out
    for _ in range(2):
        with pytest.raises(httpx.HTTPStatusError):
            tokens(server)
    assert run("push", folders["B"], "--url", server).code == 0
    assert tokens(server) == on_b


def test_a_server_is_parked_and_unparked(
    run: Run, server: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request meanwhile is refused and does not end the server; a push counts afterwards."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert run("push", folders["B"], "--url", server).code == 0
    on_b = tokens(server)
    assert run("push", folders["A"], "--url", server).code == 0
    said = run("park", server, "--json")
    assert (said.code, said.json[0]["state"]) == (0, "parked"), said.err
    said = run("status", server)
    assert (said.code, "host memory (parked)" in said.out) == (1, True)
    with pytest.raises(httpx.HTTPStatusError):
        tokens(server)
    fact, _ = complaint(run("verify", server, folders["A"]))
    assert "parked" in fact
    assert run("push", folders["B"], "--url", server, "--pause", "none").code == 0
    said = run("unpark", server)
    assert (said.code, "are on cpu" in said.out) == (0, True), said.err
    assert run("status", server).code == 0
    assert tokens(server) == on_b
