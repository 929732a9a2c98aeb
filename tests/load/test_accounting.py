"""What may be passed over, by which rule, and what looks like it and may not; what no dtype can hold."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from reload_plugin.checkpoint import file_source
from reload_plugin.errors import MisshapenWeightsError, UnexpectedWeightsError
from reload_plugin.plan.ignore_rules import ignorable
from tests import oracle
from tests.checkpoints import WEIGHTS, read_tensors
from tests.zoo import Case, case_named


def with_drafts(count: int) -> Case:
    """A model whose checkpoints hold that many draft layers after its own."""
    plain = case_named("deepseek_v3")
    return replace(plain, name=f"drafts_{count}", config={**plain.config, "num_nextn_predict_layers": count})


NAMES = ("llama", "llama_tied", "gpt2", "w8a8_dynamic")
CASES = {case.name: case for case in (*map(case_named, NAMES), with_drafts(0), with_drafts(1))}


@dataclass
class Served:
    """One of vLLM's models on checkpoint A, with no engine around it."""

    model: torch.nn.Module
    folders: Mapping[str, Path]
    start: oracle.Snapshot

    def now(self) -> oracle.Snapshot:
        status = reload_plugin.status(self.model)[0]
        return oracle.Snapshot([{}], oracle.live_tensors(self.model), status.digest or "unknown")

    def assert_on_a(self) -> None:
        now = self.now()
        assert oracle.compare_values("", now, self.start) == []
        assert oracle.compare_places("", self.start, now) == []

    def push(self, letter: str, extra: Mapping[str, torch.Tensor]) -> reload_plugin.ReloadReport:
        weights = read_tensors(self.folders[letter]) | extra
        return reload_plugin.reload_weights(self.model, iter(weights.items()))


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    case: Case = CASES[request.param]
    folders = oracle.write(case, tmp_path_factory.mktemp(case.name))
    with oracle.built(case, folders["A"]) as model:
        found = Served(model, folders, oracle.Snapshot([], {}))
        found.start = found.now()
        yield found


IGNORED = {
    "rotary": ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (16,), "rotary table"),
    "tied head": ("llama_tied", "lm_head.weight", (256, 128), "tied head"),
    "mask": ("gpt2", "transformer.h.0.attn.bias", (1, 1, 128, 128), "attention mask buffer"),
    "masked": ("gpt2", "transformer.h.0.attn.masked_bias", (), "attention mask buffer"),
    "draft": ("drafts_1", "model.layers.2.self_attn.o_proj.weight", (128, 128), "draft (MTP) layer"),
    "bias": (
        "w8a8_dynamic",
        "model.layers.0.mlp.down_proj.bias",
        (128,),
        "unused bias of a quantized checkpoint",
    ),
}
REFUSED = {
    "rotary": ("llama", "model.layers.0.self_attn.rotary_emb.weight", (16,)),
    "bias": ("llama", "model.layers.0.mlp.down_proj.bias", (128,)),
    "mask": ("gpt2", "transformer.h.0.attn.bias", (128,)),
    "no drafts": ("drafts_0", "model.layers.2.self_attn.o_proj.weight", (128, 128)),
    "beyond the drafts": ("drafts_1", "model.layer.2.self_attn.o_proj.weight", (128, 128)),
    "tied head": ("llama_tied", "lm_head.scale", (256,)),
    "quantized": ("w8a8_dynamic", "model.layers.0.mlp.down_proj.biases", (128,)),
}


def on_its_model(rows: Mapping[str, tuple]) -> pytest.MarkDecorator:
    """The model that each row is about is what `served` starts; it is handed on with the rest of the row."""
    pairs = [(row[0], row[1:]) for row in rows.values()]
    return pytest.mark.parametrize(("served", "row"), pairs, ids=rows, indirect=["served"])


@on_its_model(IGNORED)
def test_a_weight_without_a_place_is_passed_over_by_a_rule_with_a_name(served: Served, row: tuple) -> None:
    name, shape, rule = row
    assert name not in read_tensors(served.folders["A"])
    for letter in "BA":
        extra = torch.ones(shape)
        if rule == "tied head":  # one that differs from the embedding is refused
            extra = read_tensors(served.folders[letter])["model.embed_tokens.weight"]
        report = served.push(letter, {name: extra})
        assert report.ignored == {name: rule}
    served.assert_on_a()


@on_its_model(REFUSED)
def test_what_only_looks_like_it_is_refused_by_name(served: Served, row: tuple) -> None:
    """vLLM's own loaders drop some of these without a word."""
    name, shape = row
    with pytest.raises(UnexpectedWeightsError) as caught:
        served.push("B", {name: torch.ones(shape)})
    assert list(caught.value.unexpected) == [name]
    served.assert_on_a()


# --- the rules by themselves ---


def rule_of(
    name: str, shape: tuple[int, ...] = (4, 4), quantized: bool = False, ranks: int = 1, **config: object
) -> str | None:
    return ignorable(name, shape, SimpleNamespace(**config), quantized, ranks)


TIED = {"tie_word_embeddings": True}
DEEP = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
BIAS = "unused bias of a quantized checkpoint"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("model.rotary_emb.inv_freq", "rotary table"),
        ("model.layers.3.self_attn.rotary_emb.cos_cached", "rotary table"),
        ("model.layers.3.self_attn.rotary_emb.original_inv_freq", "rotary table"),
        ("encoder.rotary_pos_emb.inv_freq", "rotary table"),
        ("layers.0.rope.freqs", "rotary table"),
        ("model.layers.3.self_attn.rotary_emb.weight", None),
        ("model.inv_freq_proj.weight", None),
        ("model.rotary_emb.inv_freq.weight", None),
        ("embeddings.position_ids", "position ids"),
        ("vision_model.embeddings.position_ids", "position ids"),
        ("embeddings.position_ids.weight", None),
        ("embeddings.position_embeddings.weight", None),
        ("mtp.layers.0.weight", "draft (MTP) layer"),
        ("model.mtp.norm.weight", "draft (MTP) layer"),
        ("model.mtp_block.weight", "draft (MTP) layer"),
        ("model.smtp.weight", None),
        ("model.mtpx.weight", None),
    ],
)
def test_a_name_decides(name: str, rule: str | None) -> None:
    assert rule_of(name) == rule


@pytest.mark.parametrize("layer", ["attn", "attention", "self_attn"])
def test_a_mask_has_more_than_one_dimension_and_a_bias_has_one(layer: str) -> None:
    for name in (f"h.0.{layer}.bias", f"h.0.{layer}.masked_bias"):
        assert rule_of(name, (1, 1, 8, 8)) == "attention mask buffer"
        assert rule_of(name, (8,)) is None
    assert rule_of(f"h.0.{layer}.masked_bias", ()) == "attention mask buffer"
    for name in (f"h.0.{layer}.o_proj.bias", f"h.0.{layer}.bias.weight", f"h.0.x{layer}.bias"):
        assert rule_of(name, (1, 1, 8, 8)) is None


@pytest.mark.parametrize("name", ["lm_head.weight", "model.lm_head.weight", "embed_out.weight"])
def test_a_head_is_passed_over_only_where_it_is_tied(name: str) -> None:
    assert rule_of(name, **TIED) == "tied head"
    assert rule_of(name, tie_word_embeddings=False) is None
    assert rule_of(name) is None
    assert rule_of(name.replace("weight", "bias"), **TIED) is None
    text = SimpleNamespace(**TIED)
    assert rule_of(name, get_text_config=lambda: text) == "tied head"


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.attention.output.weight", "layer_output.weight", "my_lm_head.weight", "output.weights"],
)
def test_what_ends_like_a_head_is_none(name: str) -> None:
    assert rule_of(name, **TIED) is None


def test_layers_after_the_last_are_drafts_only_where_the_config_has_any() -> None:
    assert rule_of("model.layers.2.norm.weight", **DEEP) == "draft (MTP) layer"
    assert rule_of("model.layers.1.norm.weight", **DEEP) is None
    assert rule_of("model.layers.2.norm.weight", num_hidden_layers=2, num_nextn_predict_layers=0) is None
    assert rule_of("model.layers.2.norm.weight", num_hidden_layers=2) is None
    assert rule_of("model.layers.2.norm.weight", num_nextn_predict_layers=1) is None
    assert rule_of("model.norm.weight", **DEEP) is None


def test_a_bias_is_unused_only_where_the_checkpoint_is_quantized() -> None:
    assert rule_of("model.layers.0.mlp.up_proj.bias", (4,), quantized=True) == BIAS
    assert rule_of("model.layers.0.mlp.up_proj.bias", (4,)) is None
    for name in ("up_proj.biases", "up_proj.bias_scale", "up_projbias", "up_proj.weight"):
        assert rule_of(f"model.mlp.{name}", (4,), quantized=True) is None


def test_another_rank_has_a_layer_or_an_expert_only_where_there_is_another_rank() -> None:
    for name in ("model.layers.7.norm.weight", "mlp.experts.3.up_proj.weight"):
        assert rule_of(name, ranks=2) == "another rank's"
        assert rule_of(name) is None
    for name in ("model.norm.weight", "model.experts.router.weight", "lm_head.weight"):
        assert rule_of(name, ranks=2) is None


# --- what no dtype can hold ---


@pytest.mark.parametrize(
    ("served", "name", "dtype", "target"),
    [
        ("llama", "model.norm.weight", torch.complex64, "torch.bfloat16"),
        ("llama", "model.layers.1.self_attn.k_proj.weight", torch.complex64, "torch.bfloat16"),
        ("w8a8_dynamic", "model.layers.1.mlp.down_proj.weight", torch.float32, "torch.int8"),
        ("w8a8_dynamic", "model.layers.1.mlp.down_proj.weight", torch.bfloat16, "torch.int8"),
    ],
    indirect=["served"],
)
def test_a_cast_that_would_lose_everything_is_refused_before_a_byte_is_read(
    served: Served,
    name: str,
    dtype: torch.dtype,
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(served.folders["B"], tmp_path, dirs_exist_ok=True)
    tensors = read_tensors(tmp_path)
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / WEIGHTS)
    with monkeypatch.context() as patch:
        patch.setattr(file_source, "read_in_batches", lambda *_: pytest.fail("a weight was read"))
        with pytest.raises(MisshapenWeightsError) as caught:
            reload_plugin.reload_weights(served.model, weights_path=str(tmp_path))
    assert list(caught.value.misshapen) == [name]
    assert f"{dtype} cannot be loaded into {target}" in str(caught.value)
    served.assert_on_a()
    save_file(tensors, tmp_path / WEIGHTS)
    reload_plugin.reload_weights(served.model, weights_path=str(tmp_path))
    assert served.now().digest != served.start.digest, "the folder is not read at all"
    served.push("A", {})
    served.assert_on_a()
