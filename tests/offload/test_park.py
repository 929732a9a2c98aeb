"""A running engine whose weights are parked: read, written, reloaded, and served again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from reload_plugin.cli import parking
from reload_plugin.cli import server as remote
from reload_plugin.cli.show import FINE, NO, CommandError
from reload_plugin.transaction.engine_state import state_of
from tests import oracle
from tests.checkpoints import read_tensors
from tests.zoo import case_named

CASE = case_named("llama_tied")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return oracle.write(CASE, tmp_path_factory.mktemp("parked"))


@pytest.fixture(scope="module")
def llm(folders: dict[str, Path]) -> Iterator[Any]:
    with oracle.running(CASE, folders["A"]) as engine:
        yield engine


@pytest.fixture
def on_a(llm: Any, folders: dict[str, Path]) -> Any:
    oracle.reload_from_folder(llm, folders["A"])
    return llm


def described(model: torch.nn.Module) -> list[tuple[object, ...]]:
    found = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(t), type(t), sorted(t.__dict__), t.shape, t.data_ptr()) for name, t in found]


def test_parked_weights_are_the_same_tensors_and_nothing_serves(on_a: Any) -> None:
    served, before = oracle.answer(on_a), described(oracle.model_of(on_a))
    (report,) = reload_plugin.park(on_a)
    assert report.state == "parked"
    assert report.tensors == report.nbytes == 0  # they are in host memory anyway
    assert any(name.endswith("qkv_proj.weight") for name in report.packed)
    assert described(oracle.model_of(on_a)) == before
    (status,) = reload_plugin.status(on_a)
    assert (status.state, status.weights) == ("parked", "host memory (parked)")
    with pytest.raises(reload_plugin.SessionError, match="unpark"):
        oracle.answer(on_a)
    with pytest.raises(reload_plugin.SessionError, match="unpark"):
        reload_plugin.verify(on_a, "nothing")
    assert reload_plugin.unpark(on_a)[0].written is False
    assert reload_plugin.unpark(on_a)[0].state == "serving"  # again: nothing happens
    (status,) = reload_plugin.status(on_a)
    assert (status.state, status.weights, status.known) == ("serving", "cpu", True)
    assert oracle.differing_answers(oracle.answer(on_a), served) == []


def test_a_reload_and_an_edit_while_parked_show_afterwards(
    on_a: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = read_tensors(folders["B"])
    edited = [name for name in tensors if name.endswith("norm.weight")]
    with reload_plugin.parked(on_a):
        oracle.reload_from_folder(on_a, folders["B"])
        parameters = dict(oracle.model_of(on_a).named_parameters())
        for name in edited:
            assert torch.equal(parameters[name], tensors[name])  # read while parked: what was reloaded
            parameters[name].data.add_(0.25)
            tensors[name] = tensors[name] + 0.25
    (status,) = reload_plugin.status(on_a)
    assert not status.known
    assert "parked" in status.source
    warm = oracle.answer(on_a)

    merged = tmp_path / "merged"
    merged.mkdir()
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    (merged / "config.json").write_text((folders["B"] / "config.json").read_text())
    oracle.reload_from_folder(on_a, merged)
    assert oracle.differing_answers(warm, oracle.answer(on_a)) == []
    assert oracle.differing_answers(warm, answers_of(on_a, folders["B"])) != []


def answers_of(llm: Any, folder: Path) -> list[Any]:
    oracle.reload_from_folder(llm, folder)
    return oracle.answer(llm)


def test_an_open_update_is_not_parked(on_a: Any) -> None:
    model = oracle.model_of(on_a)
    with reload_plugin.restore_for_reloading(model):
        with pytest.raises(reload_plugin.SessionError, match="update is open"):
            reload_plugin.park(model)
        weights = read_tensors(Path(on_a.llm_engine.model_config.model))
        model.load_weights(iter(weights.items()))
    oracle.answer(on_a)


class Direct(remote.Server):
    """A server whose routes call the engine of this process."""

    def __init__(self, llm: Any) -> None:
        super().__init__("http://localhost", None, 60.0)
        self._llm = llm
        self.routes: list[str] = []

    def post(self, route: str, body: Any = None, timeout: float | None = None) -> dict[str, Any]:
        if route != "collective_rpc":
            self.routes.append(route)
            return {}
        answers = self._llm.collective_rpc(body["method"], kwargs=body["kwargs"])
        found: dict[str, Any] = json.loads(json.dumps({"results": answers}))
        return found


def test_the_commands(on_a: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    server = Direct(on_a)
    assert parking.park(server, "wait", in_json=False) == FINE
    assert "packed" in capsys.readouterr().out
    assert remote.show_status(server, in_json=False) == NO
    assert "host memory (parked)" in capsys.readouterr().out
    assert parking.unpark(server, in_json=False) == FINE
    assert "are on cpu" in capsys.readouterr().out
    assert server.routes == ["pause?mode=wait", "resume"]
    with pytest.raises(CommandError, match="cannot serve"):
        parking.park(server, "none", in_json=True)
    with monkeypatch.context() as patch:
        patch.setattr(state_of(oracle.model_of(on_a)), "broken", "half of it")
        with pytest.raises(reload_plugin.EngineBrokenError):
            parking.park(server, "abort", in_json=True)
    assert server.routes[-2:] == ["pause?mode=abort", "resume"]
    oracle.answer(on_a)
