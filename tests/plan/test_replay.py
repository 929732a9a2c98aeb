"""What is replayed, what still takes the model's loader, and that the report counts both."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from reload_plugin.commit.group_commit import Commit
from reload_plugin.transaction import known
from reload_plugin.transaction.engine_state import state_of
from tests import oracle
from tests.checkpoints import Tensors, read_tensors
from tests.zoo import case_named


def by_folder(model: torch.nn.Module, folder: Path) -> reload_plugin.ReloadReport:
    return reload_plugin.reload_weights(model, weights_path=str(folder))


def by_iterator(model: torch.nn.Module, folder: Path) -> reload_plugin.ReloadReport:
    return reload_plugin.reload_weights(model, iter(read_tensors(folder).items()))


def values(model: torch.nn.Module) -> dict[str, str]:
    return {path: live.digest for path, live in oracle.live_tensors(model).items()}


def without_prefix(tensors: Tensors) -> Tensors:
    """GPT-2's checkpoints come with either name, and vLLM's loader takes both."""
    return {name.replace("transformer.h.1.", "h.1."): tensor for name, tensor in tensors.items()}


def test_a_name_that_fits_under_another_spelling_is_loaded(tmp_path: Path) -> None:
    case = case_named("gpt2")
    folders = oracle.write(case, tmp_path)
    spelled = tmp_path / "spelled"
    spelled.mkdir()
    (spelled / "config.json").write_bytes((folders["B"] / "config.json").read_bytes())
    save_file(without_prefix(read_tensors(folders["B"])), spelled / "model.safetensors")
    assert read_tensors(spelled).keys() != read_tensors(folders["B"]).keys()
    with oracle.built(case, spelled) as model:
        cold = values(model)
    with oracle.built(case, folders["A"]) as model:
        for reload in (by_folder, by_iterator):
            for folder in (folders["B"], folders["A"], folders["B"], folders["A"]):
                report = reload(model, folder)
            assert report.replayed == report.tensors
            for folder in (spelled, folders["A"], spelled):
                report = reload(model, folder)
            assert values(model) == cold


def test_the_report_counts_what_the_loader_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba's loader makes ``-exp(A_log)`` of one weight a layer; all others are copied."""
    case = case_named("nemotron_h")
    folders = oracle.write(case, tmp_path)
    logs = [name for name in read_tensors(folders["A"]) if name.endswith("A_log")]
    assert logs, "this model computes nothing"
    traced: list[object] = []
    plain = known.make_plan
    monkeypatch.setattr(known, "make_plan", lambda *args: traced.append(args) or plain(*args))
    with oracle.built(case, folders["B"]) as model:
        cold = values(model)
    with oracle.built(case, folders["A"]) as model:
        for reload in (by_iterator, by_folder, by_iterator):
            for letter in "BAB":
                traced.clear()
                report = reload(model, folders[letter])
                assert (report.computed, report.replayed) == (len(logs), report.tensors - len(logs))
            assert traced == [], "a copy plan that was learnt once is learnt again"
            assert values(model) == cold
        assert reload_plugin.status(model)[0].report.computed == len(logs)
        report = reload_plugin.reload_weights(
            model, iter(read_tensors(folders["A"]).items()), whole_model=True
        )
        assert (report.computed, report.replayed) == (len(logs), 0)
        seconds = by_folder(model, folders["A"]).seconds
        assert 0 < seconds["plan"] < seconds["total"]
        logs_only = {name: read_tensors(folders["B"])[name] for name in logs}
        report = reload_plugin.reload_weights(model, iter(logs_only.items()), partial=True)
        assert (report.computed, report.replayed) == (len(logs), report.tensors - len(logs))


def test_a_first_commit_that_fails_half_way_brings_the_start_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an iterator, so that nobody has asked before whether the old weights can be read again."""
    case = case_named("llama_tied")
    folders = oracle.write(case, tmp_path)
    apply, applied = Commit.apply, []

    def failing(self: Commit) -> None:
        applied.append(self.name)
        if len(applied) == 3:
            raise MemoryError("no room")
        apply(self)

    with oracle.built(case, folders["A"]) as model:
        before = values(model)
        with monkeypatch.context() as patch:
            patch.setattr(Commit, "apply", failing)
            with pytest.raises(reload_plugin.ReloadError, match="no room"):
                by_iterator(model, folders["B"])
        assert len(applied) > 3, "nothing was brought back"
        assert values(model) == before
        state_of(model).before_forward_pass()
        by_iterator(model, folders["B"])
        assert values(model) != before
