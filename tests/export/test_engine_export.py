"""A running engine: exported through its workers, and started again on the export."""

import json
from pathlib import Path

import pytest

from reload_plugin import ExportError, SourceError, export_checkpoint, verify
from reload_plugin.cli import server as remote
from reload_plugin.cli import weights_out
from reload_plugin.cli.show import FINE, NO
from tests import exports, oracle
from tests.checkpoints import read_tensors
from tests.zoo import case_named


class Direct(remote.Server):
    """A server whose route calls the engine of this process, as vLLM's ``/collective_rpc`` does."""

    def __init__(self, llm: object) -> None:
        super().__init__("http://localhost", None, 60.0)
        self._llm = llm

    def post(self, route: str, body: object = None, timeout: float | None = None) -> dict:
        assert route == "collective_rpc"
        answers = self._llm.collective_rpc(body["method"], kwargs=body["kwargs"])
        return json.loads(json.dumps({"results": answers}))


def test_export_and_start_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    case = case_named("llama")
    folders = oracle.write(case, tmp_path)
    weights = read_tensors(folders["B"])
    with oracle.running(case, folders["A"]) as llm:
        oracle.reload_from_stream(llm, folders["B"])
        served = oracle.answer(llm)
        report = export_checkpoint(llm, tmp_path / "out", max_shard_size="200KB")
        assert exports.differing(read_tensors(tmp_path / "out"), weights) == {}
        assert report.tensors == len(weights)
        assert "config.json" in report.copied
        assert verify(llm, tmp_path / "out").serves
        with pytest.raises(ExportError, match="lossy"):
            export_checkpoint(llm, tmp_path / "other", lossy="much")
        with pytest.raises(SourceError):
            verify(llm, tmp_path / "nothing")

        server = Direct(llm)
        assert weights_out.verify(server, str(folders["B"]), in_json=False) == FINE
        assert weights_out.verify(server, str(folders["A"]), in_json=False) == NO
        assert "does not serve" in capsys.readouterr().out
        assert (
            weights_out.export(server, str(tmp_path / "http"), {"max_shard_size": "5GB"}, in_json=False)
            == FINE
        )
        assert "proven inverse" in capsys.readouterr().out
        with pytest.raises(ExportError, match="max_shard_size"):
            weights_out.export(server, str(tmp_path / "bad"), {"max_shard_size": "much"}, in_json=True)
        assert exports.differing(read_tensors(tmp_path / "http"), weights) == {}
    with oracle.running(case, tmp_path / "out") as llm:
        assert oracle.differing_answers(oracle.answer(llm), served) == []
