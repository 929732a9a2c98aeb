"""More of vLLM's models, without an engine around them: a reload leaves every tensor as a cold start does.

Of kinds that `zoo` has none of: encoders, classifiers, models of several parts, loaders that keep weights
back or write what nobody sent, and more quantizations.
"""

import functools
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reload_plugin import ReloadSession, reload_weights, restore_for_reloading
from reload_plugin.errors import PartialUpdateError
from reload_plugin.record.staged_storage import POISON
from tests import checkpoints, oracle
from tests.architectures import WAYS, case_of, places, values
from tests.checkpoints import Config, read_tensors
from tests.processor import skip_without
from tests.zoo import EXPERTS, GQA, INT4, LLAMA, LLAMA_TIED, QWEN3_MOE, SIZES, Case, case_named

POOLING = {"runner": "pooling"}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
BERT = SIZES | {"num_labels": 1}
ROBERTA = BERT | {"max_position_embeddings": 130, "pad_token_id": 1}
MODERNBERT = BERT | {
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSIFIER = GQA | {"num_labels": 2, "pad_token_id": 0}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
SOME_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 32,
}
JAMBA = GQA | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "use_mamba_kernels": False,
    "pad_token_id": 0,
}
WHISPER = {
    "vocab_size": 256,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_target_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
GEMMA4 = GQA | SLIDING | {"head_dim": 32, "global_head_dim": 32, "num_kv_shared_layers": 0}
GEMMA4_EXPERTS = {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
IDEFICS3 = {
    "text_config": GQA | {"model_type": "llama", "pad_token_id": 0},
    "vision_config": VISION,
    "image_token_id": 200,
    "scale_factor": 1,
    "pad_token_id": 0,
}
LLAMA4 = GQA | {
    "intermediate_size_mlp": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "head_dim": 32,
    "moe_layers": [1],
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 64,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Row:
    """A model of transformers', and whether its loader can be replayed."""

    model_type: str
    cls: str
    config: Config
    options: Mapping[str, object] | None = None
    replayed: bool = True

    @property
    def case(self) -> Case:
        config = {"model_type": self.model_type, **self.config}
        write = functools.partial(checkpoints.write_transformers, cls=self.cls)
        return Case(self.cls, config, write, engine_kwargs=self.options or {})


ROWS = (
    Row("bert", "BertModel", BERT, POOLING, replayed=False),  # its loader collects all weights first
    # Fills its head from the embeddings, when all has come.
    Row("bert", "BertForMaskedLM", BERT, POOLING, replayed=False),
    Row("bert", "BertForSequenceClassification", BERT, POOLING),
    Row("xlm-roberta", "XLMRobertaForSequenceClassification", ROBERTA, POOLING),
    # Keeps the weights of its head back.
    Row("modernbert", "ModernBertForSequenceClassification", MODERNBERT, POOLING, replayed=False),
    Row("modernbert", "ModernBertForTokenClassification", MODERNBERT, POOLING),
    Row("qwen3", "Qwen3ForSequenceClassification", CLASSIFIER | {"head_dim": 32}, POOLING),
    Row("llama", "LlamaModel", GQA, POOLING),
    # Writes zeros for biases that no checkpoint has, when all else has come.
    Row("whisper", "WhisperForConditionalGeneration", WHISPER, replayed=False),
    Row("idefics3", "Idefics3ForConditionalGeneration", IDEFICS3),
    Row("jamba", "JambaForCausalLM", JAMBA),
    Row("llama4_text", "Llama4ForCausalLM", LLAMA4),
    Row("gemma4_text", "Gemma4ForCausalLM", GEMMA4 | GEMMA4_EXPERTS),
    Row("glm4_moe", "Glm4MoeForCausalLM", GQA | ROUTED_EXPERTS),  # a router in float32
    Row("cohere2_moe", "Cohere2MoeForCausalLM", GQA | SLIDING | SOME_EXPERTS | {"head_dim": 32}),
    # By vLLM's Transformers backend: a router's bias belongs to three layers.
    Row("dots1", "Dots1ForCausalLM", GQA | ROUTED_EXPERTS),
    Row("flex_olmo", "FlexOlmoForCausalLM", EXPERTS | {"pad_token_id": 0, "eos_token_id": 1}),
    # Its loader makes a parameter when a weight comes, so there is no plan.
    Row("phi", "PhiForCausalLM", SIZES, replayed=False),
)


def torchao(name: str) -> dict[str, object]:
    """The options of an engine that quantizes by a configuration of torchao's while it loads."""
    spelled = json.dumps({"_type": name, "_version": 2, "_data": {}})
    return {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": spelled}}


QUANTIZED = (
    Case("w4a16, zero points", LLAMA, checkpoints.write_w4a16_asymmetric, needs=INT4),
    Case("w4a16, in part", LLAMA, checkpoints.write_w4a16_in_part, needs=INT4),
    Case("auto-round", LLAMA, checkpoints.write_autoround, needs=INT4),
    Case("quark int8", LLAMA, checkpoints.write_quark_int8),
    Case("torchao int8 dynamic", LLAMA, engine_kwargs=torchao("Int8DynamicActivationInt8WeightConfig")),
    Case("torchao fp8", LLAMA_TIED, engine_kwargs=torchao("Float8WeightOnlyConfig")),
    Case("torchao intx", QWEN3_MOE, engine_kwargs=torchao("IntxWeightOnlyConfig")),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For checkpoints, each written before vLLM changes the class of transformers' that writes it."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.cls)
def test_a_reload_leaves_every_tensor_as_a_cold_start_does(row: Row, root: Path) -> None:
    assert (replayed_after_reloads(row.case, root) > 0) is row.replayed


@pytest.mark.parametrize("case", QUANTIZED, ids=lambda case: case.name)
def test_a_reload_quantizes_as_a_cold_start_does(case: Case, tmp_path: Path) -> None:
    skip_without(case.needs)
    assert replayed_after_reloads(case, tmp_path) > 0


def replayed_after_reloads(case: Case, root: Path) -> int:
    """Reload back and forth from folders and streams. Returns how many weights were replayed at the end."""
    folders = oracle.write(case, root)
    with oracle.built(case, folders["B"]) as model:
        of_b = values(model)
    with oracle.built(case, folders["A"]) as model:
        expected, before = {"A": values(model), "B": of_b}, places(model)
        assert expected["A"] != expected["B"]
        for letter, streams in (("B", False), ("A", True), ("B", True), ("A", False), ("B", False)):
            if streams:
                report = reload_weights(model, iter(read_tensors(folders[letter]).items()))
            else:
                report = reload_weights(model, weights_path=str(folders[letter]))
            now = values(model)
            differing = {
                path for path in now.keys() | of_b.keys() if now.get(path) != expected[letter].get(path)
            }
            assert differing == set()
            assert places(model) == before
    return report.replayed


GLM_ASR = case_of("GlmAsrForConditionalGeneration")
"""Its loader writes zeros for biases that no checkpoint has, when a part of the model is over: by then the
first weight of the next part has come."""


@pytest.mark.parametrize("comes", ["folder", "stream"])
def test_values_that_a_loader_writes_without_a_weight_are_written_at_each_reload(
    monkeypatch: pytest.MonkeyPatch, comes: str, root: Path
) -> None:
    monkeypatch.setenv(POISON, "1")
    folders = oracle.write(GLM_ASR, root)
    with oracle.built(GLM_ASR, folders["A"]) as model:
        expected = values(model)
        for _ in range(2):
            if comes == "folder":
                report = reload_weights(model, weights_path=str(folders["A"]), policy="host")
            else:
                report = reload_weights(model, iter(read_tensors(folders["A"]).items()))
            assert values(model) == expected
        assert report.replayed == 0


# --- weights that share a slot ---


ROW_OF = {row.cls: row for row in ROWS}
IN_ANY_ORDER = (
    *map(case_named, ("w8a8_static", "w8a8_asymmetric", "w4a16")),
    # Have weights for buffers, or for a parameter that the loader makes, in layers that are whole without.
    ROW_OF["Gemma4ForCausalLM"].case,
    ROW_OF["PhiForCausalLM"].case,
    ROW_OF["BertForMaskedLM"].case,
    GLM_ASR,
)


@pytest.mark.parametrize("case", IN_ANY_ORDER, ids=lambda case: case.name)
def test_the_order_of_the_weights_does_not_change_the_result(case: Case, root: Path) -> None:
    """The parts of a fused layer write their input scales, zero points or shapes to the same place."""
    skip_without(case.needs)
    folders = oracle.write(case, root)
    weights = {letter: list(read_tensors(folder).items()) for letter, folder in folders.items()}
    with oracle.built(case, folders["B"]) as model:
        of_b = values(model)
    with oracle.built(case, folders["A"]) as model:
        expected, before, rounds = {"A": values(model), "B": of_b}, places(model), random.Random(0)
        for known in (False, True):
            for number, (way, reload) in enumerate(WAYS.items()):
                letter = "BA"[number % 2]
                rounds.shuffle(weights[letter])
                reload(model, weights[letter])
                assert values(model) == expected[letter], (way, known)
                assert places(model) == before
            reload_weights(model, weights_path=str(folders["A"]))
            assert values(model) == expected["A"]


@pytest.mark.parametrize("name", ["w8a8_static", "w4a16"])
def test_a_file_in_an_order_of_its_own_is_loaded_as_a_cold_start_does(name: str, tmp_path: Path) -> None:
    """vLLM asks a file of safetensors for its names, and gets them sorted, however they lie in it."""
    case = case_named(name)
    skip_without(case.needs)
    folders = oracle.write(case, tmp_path)
    for folder in folders.values():
        write_queries_last(folder / checkpoints.WEIGHTS)
    with oracle.built(case, folders["B"]) as model:
        of_b = values(model)
    with oracle.built(case, folders["A"]) as model:
        of_a = values(model)
        for letter, expected in (("B", of_b), ("A", of_a), ("B", of_b)):
            reload_weights(model, weights_path=str(folders[letter]))
            assert values(model) == expected
        reload_weights(model, iter(read_tensors(folders["A"]).items()))
        assert values(model) == of_a


def test_load_weights_returns_the_same_names_by_copy_plan_and_by_loader(tmp_path: Path) -> None:
    """Frameworks look at what ``load_weights`` returns."""
    case = case_named("qwen2")
    weights = read_tensors(oracle.write(case, tmp_path)["A"])
    parts = [dict(list(weights.items())[part::2]) for part in range(2)]
    with oracle.built(case, tmp_path / case.name / "A") as model:
        with ReloadSession(model) as session:
            by_loader = [session.load(iter(part.items())) for part in parts]
        with restore_for_reloading(model) as session:
            by_copy_plan = [model.load_weights(iter(part.items())) for part in parts]
        assert session.report.replayed == len(weights)
        assert by_copy_plan == by_loader
        assert all(by_loader)


@pytest.mark.parametrize("head", [False, True], ids=["no head on disk", "a head on disk"])
def test_a_partial_update_changes_what_a_loader_fills_from_it(head: bool, tmp_path: Path) -> None:
    """Of some weights of this model nobody knows where they go, so all are read again, also where that is
    known of all together: a head of its own is not filled from the embeddings.
    """
    case, name = ROW_OF["BertForMaskedLM"].case, "bert.embeddings.word_embeddings.weight"
    root, folders = tmp_path, oracle.write(case, tmp_path)
    sent = {name: read_tensors(folders["B"])[name]}
    if head:
        own = {"cls.predictions.decoder.weight": sent[name] * 2}
        save_file(read_tensors(folders["A"]) | own, folders["A"] / checkpoints.WEIGHTS)
    both = root / "both"
    shutil.copytree(folders["A"], both)
    save_file(read_tensors(folders["A"]) | sent, both / checkpoints.WEIGHTS)
    with oracle.built(case, both) as model:
        expected = values(model)
    with oracle.built(case, folders["A"]) as model:
        reload_weights(model, iter(sent.items()), partial=True)
        assert values(model) == expected
        reload_weights(model, iter(read_tensors(folders["A"]).items()))  # nobody can read them again
        before = values(model)
        with pytest.raises(PartialUpdateError, match="delays weights or combines several"):
            reload_weights(model, iter(sent.items()), partial=True)
        assert values(model) == before


KINDS = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""What safetensors calls a dtype."""


def write_queries_last(path: Path) -> None:
    """Write a file of safetensors anew with queries behind keys and values, in its header as in its data."""
    with safe_open(path, "pt") as file:
        names = sorted(file.keys(), key=lambda name: ("q_proj" in name, name))
        weights = {name: file.get_tensor(name) for name in names}
    header, data = {}, b""
    for name, tensor in weights.items():
        values = bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())
        kind = KINDS[tensor.dtype]
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
