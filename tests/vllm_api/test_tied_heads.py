"""A config that ties the head to the embedding, over checkpoints that hold no head, the same one, or another.

vLLM builds such a model untied where the checkpoint it starts on has a head, and ties it again in its
processing where the two are equal. A reload equals the start on the new checkpoint, or is refused.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from reload_plugin import vllm_api
from tests import oracle
from tests.checkpoints import read_tensors
from tests.zoo import case_named

pytest.importorskip(
    "vllm.model_executor.model_loader.weight_tying", reason="vLLM ties heads again from 0.29 on"
)

CASE = case_named("llama_tied")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEADS = ("none", "same", "other")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Generation and kind of head -> checkpoint."""
    plain = oracle.write(CASE, tmp_path_factory.mktemp("plain"))
    found = {}
    for letter, folder in plain.items():
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
        weights = read_tensors(folder)
        assert HEAD not in weights
        generator = torch.Generator().manual_seed(ord(letter))
        other = weights[EMBEDDING][torch.randperm(len(weights[EMBEDDING]), generator=generator)]
        for kind, head in (
            ("none", None),
            ("same", weights[EMBEDDING].clone()),
            ("other", other.contiguous()),
        ):
            target = tmp_path_factory.mktemp(f"{letter}-{kind}")
            shutil.copytree(folder, target, dirs_exist_ok=True)
            for file in target.glob("*.safetensors*"):
                file.unlink()
            save_file(weights | ({} if head is None else {HEAD: head}), target / "model.safetensors")
            found[letter, kind] = target
    return found


@pytest.fixture(scope="module")
def cold(folders: dict[tuple[str, str], Path]) -> dict[tuple[str, str], oracle.Snapshot]:
    """What an engine started on each checkpoint answers and holds."""
    found = {}
    for key, folder in folders.items():
        with oracle.running(CASE, folder) as llm:
            found[key] = oracle.snapshot(llm, CASE)
    assert oracle.differing_answers(found["B", "same"].answers, found["B", "other"].answers)
    return found


def differences(warm: oracle.Snapshot, cold: oracle.Snapshot) -> list[str]:
    """Answers and values by path. The digest is left out: it tells a tied head from an equal one."""
    return [
        f"{found.kind} {found.path}"
        for found in oracle.compare_values("", warm, cold)
        if found.kind != "digest"
    ]


STARTED = ["none", "same", "other"]


@pytest.mark.slow
@pytest.mark.parametrize("road", ["folder", "iterator"])
@pytest.mark.parametrize("started", STARTED)
def test_a_reload_equals_a_start_or_is_refused(
    folders: dict[tuple[str, str], Path],
    cold: dict[tuple[str, str], oracle.Snapshot],
    started: str,
    road: str,
) -> None:
    reload = {"folder": oracle.reload_from_folder, "iterator": oracle.reload_from_stream}[road]
    wrong, went = {}, {}
    with oracle.running(CASE, folders["A", started]) as llm:
        served = "A", started
        for kind in (*HEADS, *reversed(HEADS)):
            for letter in "BA":
                try:
                    reload(llm, folders[letter, kind])
                except reload_plugin.ReloadError as error:
                    went[letter, kind] = f"refused: {error}"[:300]
                else:
                    went[letter, kind] = "reloaded"
                    served = letter, kind
                if found := differences(oracle.snapshot(llm, CASE), cold[served]):
                    wrong[letter, kind, went[letter, kind]] = found
                    served = "A", started
                    reload(llm, folders[served])
    assert not wrong
    assert went["B", started] == "reloaded"


@pytest.mark.parametrize("name", ["lm_head", "language_model.lm_head"])
def test_processing_of_some_layers_may_tie_a_head_that_lies_anywhere(name: str) -> None:
    """vLLM's own tying, which asks the model for the module around the head."""
    from vllm.model_executor.model_loader.weight_tying import _UntiedLMHead

    class Head(torch.nn.Linear):
        def tie_weights(self, embedding: torch.nn.Module) -> torch.nn.Module:
            self.weight = embedding.weight
            return self

    head, embedding = Head(2, 3), torch.nn.Embedding(3, 2)
    vllm_api.process_layers(
        lambda model, *_: _UntiedLMHead(name, head, embedding).tie(model),
        [("language_model.embed_tokens", embedding), (name, head)],
        None,
        torch.device("cpu"),
    )
    assert head.weight is embedding.weight
