"""Every architecture that vLLM and transformers both have, tiny and random: is a reload a cold start?

    python -m tests.architectures [NAME ...]

Configs are transformers' own with small numbers in place of the usual ones. Some cannot be written with
such numbers, and many cannot be started on a CPU, or not without packages that are not here; those say why.
Not part of the suite, which takes some of them by name.
"""

import functools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from reload_plugin import reload_weights, restore_for_reloading
from reload_plugin.transaction.chunked_update import finish_layerwise, open_layerwise
from tests import checkpoints, oracle
from tests.checkpoints import WEIGHTS, Config, read_tensors
from tests.zoo import Case

Weights = list[tuple[str, torch.Tensor]]

SECONDS = 150
"""After which an architecture is given up."""

_SMALL_BY_VALUE: Mapping[float, str] = {
    128: """hidden_size d_model n_embd hidden_dim embed_dim out_hidden_size word_embed_proj_dim conv_dim
        block_dim cross_attention_hidden_size encoder_hidden_size qformer_hidden_size rnn_hidden_size
        lru_width output_dim vision_output_dim inner_dim dim text_hidden_size decoder_hidden_size
        max_position_embeddings n_positions max_sequence_length max_seq_len max_target_positions
        attention_hidden_size""",
    256: """vocab_size vocab_size_per_layer_input intermediate_size intermediate_size_mlp n_inner d_ff ffn_dim
        encoder_ffn_dim decoder_ffn_dim block_ff_dim ffn_hidden_size mamba_d_ssm""",
    64: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        expert_ffn_hidden_size kv_lora_rank adapter_mlp_dim attention_chunk_size codebook_size
        projection_dim""",
    32: """head_dim d_kv d_head attn_head_dim attention_head_dim global_head_dim kv_channels q_lora_rank
        qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_head mamba_head_dim linear_key_head_dim
        linear_value_head_dim query_pre_attn_scalar""",
    16: "state_size mamba_d_state ssm_state_size sliding_window rotary_dim",
    8: "mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank",
    4: """num_attention_heads n_head num_heads attention_heads encoder_attention_heads
        decoder_attention_heads linear_num_value_heads num_experts num_local_experts n_routed_experts
        moe_num_experts query_length num_image_tokens""",
    2: """num_hidden_layers n_layer num_layers encoder_layers decoder_layers depth num_key_value_heads
        num_global_key_value_heads num_attention_groups linear_num_key_heads num_experts_per_tok
        num_experts_per_token moe_topk moe_k top_k_experts mamba_expand expand temporal_patch_size
        spatial_merge_size num_codebooks num_labels""",
    1: """n_group topk_group n_groups mamba_n_groups n_shared_experts num_shared_experts
        moe_num_shared_experts first_k_dense_replace num_dense_layers decoder_sparse_step
        num_global_layers partial_rotary_factor""",
    0: """num_kv_shared_layers hidden_size_per_layer_input zero_expert_num num_nextn_predict_layers""",
    14: "patch_size",
    28: "image_size window_size",
    80: "num_mel_bins",
    150: "max_source_positions",
    3: "conv_L_cache num_channels",
    -1: "vision_feature_layer",
}
SMALL = {name: value for value, names in _SMALL_BY_VALUE.items() for name in names.split()}
"""Field of a config, or of one inside of it -> its value here."""
NONE_STAYS = frozenset(
    {
        "head_dim",
        "mamba_dt_rank",
        "n_group",
        "n_inner",
        "num_key_value_heads",
        "q_lora_rank",
        "sliding_window",
    }
)
"""Fields in which None says something."""
LEFT_OUT = frozenset({"layer_types", "mlp_layer_types", "layers_block_type", "architectures", "dtype"})
"""Fields that follow from the others, or that a number of layers they do not fit."""
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
SPECIAL |= {"cls_token_id": 3, "sep_token_id": 3}

HYBRID = {"layer_types": ["conv", "full_attention"], "conv_dim": 128, "block_dim": 128, "block_ff_dim": 256}
OVERRIDES: Mapping[str, Config] = {
    "AfmoeForCausalLM": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1},
    "DeepseekV3ForCausalLM": {"topk_method": "noaux_tc"},
    "FalconForCausalLM": {"ffn_hidden_size": 512},
    "Gemma3nForCausalLM": {
        "intermediate_size": [256, 256],
        "activation_sparsity_pattern": [0.0, 0.0],
        "hidden_size_per_layer_input": 32,
    },
    "Glm4MoeForCausalLM": {"head_dim": 32},
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1, "topk_method": "noaux_tc"},
    "GteModel": {"position_embedding_type": "rope"},
    "LagunaForCausalLM": {"num_attention_heads_per_layer": [4, 4]},
    "Lfm2ForCausalLM": HYBRID | {"block_auto_adjust_ff_dim": False},
    "Lfm2MoeForCausalLM": HYBRID,
    "Llama4ForCausalLM": {
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
        "interleave_moe_layer_step": 2,
    },
    "LongcatFlashForCausalLM": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_type": "identity",
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 32},
    "MiniMaxM2ForCausalLM": {
        "rotary_dim": 16,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "NemotronForCausalLM": {"num_key_value_heads": 2, "head_dim": 32},
    "NemotronHForCausalLM": {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
    "XLMRobertaModel": {"position_embedding_type": "absolute"},
}
"""What else an architecture wants."""

_TOWER = (r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.")
_LANGUAGE = (r"language_model\.model\.", "language_model.")
RENAMED: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "Cohere2VisionForConditionalGeneration",
            "ColPaliForRetrieval",
            "Gemma3ForConditionalGeneration",
            "LlavaForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "LlavaOnevisionForConditionalGeneration",
            "PaliGemmaForConditionalGeneration",
        ),
        _TOWER,
    ),
    **dict.fromkeys(
        (
            "AudioFlamingo3ForConditionalGeneration",
            "GlmAsrForConditionalGeneration",
            "GraniteSpeechForConditionalGeneration",
            "Qwen2AudioForConditionalGeneration",
        ),
        _LANGUAGE,
    ),
}
"""Architectures whose published checkpoints have other names than transformers writes by now."""


# --- cases ---


def tiny(config: Config) -> dict[str, Any]:
    """A config with small numbers, those inside of it included."""
    return {name: _small(name, value) for name, value in config.items() if name not in LEFT_OUT}


def _small(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return tiny(value) if name.endswith("_config") else value
    if name in SPECIAL:
        return SPECIAL[name]
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
        return 200 + zlib.crc32(name.encode()) % 40
    if name == "fullatt_block_indexes":
        return [1]
    if name == "deepstack_visual_indexes":
        return [0]
    kept = isinstance(value, list) or (value is None and name in NONE_STAYS)
    return value if kept else SMALL.get(name, value)


def case_of(name: str) -> Case:
    """An architecture as a case of the tests, by the name of its class in transformers."""
    import transformers

    made = getattr(transformers, name).config_class()
    config = tiny(made.to_dict()) | OVERRIDES.get(name, {}) | {"model_type": made.model_type}
    causal = ("Causal", "Generation", "LMHead")
    generates = any(word in name for word in causal) and "Classification" not in name
    return Case(name, config, functools.partial(_write, name), {} if generates else {"runner": "pooling"})


def _write(name: str, folder: Path, config: Config, seed: int) -> None:
    checkpoints.write_transformers(folder, config, seed, cls=name)
    if name in RENAMED:
        pattern, instead = RENAMED[name]
        weights = {re.sub(pattern, instead, old): tensor for old, tensor in read_tensors(folder).items()}
        save_file(weights, folder / WEIGHTS)


# --- ways to reload ---


def by_layerwise_calls(model: torch.nn.Module, weights: Weights) -> None:
    """vLLM's own calls around an update in three pieces."""
    open_layerwise(model)
    for part in range(3):
        model.load_weights(iter(weights[part::3]))
    finish_layerwise(model)


def in_a_block(model: torch.nn.Module, weights: Weights) -> None:
    with restore_for_reloading(model):
        model.load_weights(iter(weights))


WAYS: Mapping[str, Callable[[torch.nn.Module, Weights], object]] = {
    "layerwise": by_layerwise_calls,
    "block": in_a_block,
    "host": lambda model, weights: reload_weights(model, iter(weights), policy="host"),
    "streaming": lambda model, weights: reload_weights(model, iter(weights), policy="streaming"),
    "whole": lambda model, weights: reload_weights(model, iter(weights), whole_model=True),
}
"""From an iterator, or by calls that bring weights."""


def values(model: torch.nn.Module) -> dict[str, str]:
    """Path -> digest of every tensor that can be reached from a model."""
    return {path: live.digest for path, live in oracle.live_tensors(model).items()}


def places(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Path -> object and address of the same."""
    found = oracle.live_tensors(model).items()
    return {path: (live.object_id, live.address) for path, live in found if "apply(identity)" not in path}


def verdict(name: str, root: Path) -> str:
    """Reload one architecture in every way: from folders, and by weights in order, shuffled and backwards."""
    stage = "writing"
    try:
        case = case_of(name)
        folders = oracle.write(case, root)
        stage = "a cold start"
        with oracle.built(case, folders["B"]) as model:
            of_b = values(model)
        with oracle.built(case, folders["A"]) as model:
            expected, before = {"A": values(model), "B": of_b}, places(model)
            for number, (stage, reload) in enumerate(_legs(folders)):
                letter = "BA"[number % 2]
                reload(model, letter)
                wrong = _differing(values(model), expected[letter]) or _differing(places(model), before)
                if wrong:
                    return f"WRONG after {stage}: {len(wrong)}, as {wrong[0]}"
        return "right"
    except BaseException as error:  # noqa: BLE001 - vLLM's models raise anything
        at_fault = "FAILED at" if stage not in ("writing", "a cold start") else "not started,"
        return f"{at_fault} {stage}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _legs(folders: Mapping[str, Path]) -> Iterator[tuple[str, Callable[[torch.nn.Module, str], object]]]:
    weights = {letter: list(read_tensors(folder).items()) for letter, folder in folders.items()}
    order = random.Random(0)

    def from_folder(model: torch.nn.Module, letter: str, **how: str) -> object:
        return reload_weights(model, weights_path=str(folders[letter]), **how)

    def shuffled(way: str, model: torch.nn.Module, letter: str) -> object:
        return WAYS[way](model, order.sample(weights[letter], len(weights[letter])))

    yield "a folder", from_folder
    yield "an iterator", lambda model, letter: reload_weights(model, iter(weights[letter]))
    yield "a folder, streaming", functools.partial(from_folder, policy="streaming")
    yield "a folder, host", functools.partial(from_folder, policy="host")
    yield "backwards", lambda model, letter: reload_weights(model, iter(weights[letter][::-1]))
    for way in (*WAYS, *WAYS):
        yield f"shuffled, {way}", functools.partial(shuffled, way)


def _differing(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    return sorted(path for path in now.keys() | then.keys() if now.get(path) != then.get(path))


# --- all of them ---


def everything() -> list[str]:
    """Names that both registries have."""
    import transformers
    from vllm.model_executor.models.registry import _VLLM_MODELS

    return [name for name in _VLLM_MODELS if hasattr(transformers, name)]


def _in_a_process(name: str, root: Path) -> str:
    """A verdict from a process of its own, forked here where all is imported: transformers' classes change
    when vLLM loads some models.
    """
    answer, asked = os.pipe()
    if not (child := os.fork()):
        os.close(answer)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.alarm(SECONDS)
        torch.set_num_threads(1)
        os.write(asked, verdict(name, root).encode())
        os._exit(0)
    os.close(asked)
    with os.fdopen(answer) as said:
        found = said.read()
    _, status = os.waitpid(child, 0)
    return found or f"DIED: {signal.strsignal(os.WTERMSIG(status))}"


def main(names: list[str]) -> int:
    """Print a line for each, and how many of each kind there were. Returns how many were not right."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    import vllm.model_executor.model_loader  # noqa: F401  once, for all children

    found = {}
    for name in names or everything():
        root = Path(tempfile.mkdtemp())
        found[name] = _in_a_process(name, root)
        shutil.rmtree(root)
        print(f"{name}: {found[name]}", flush=True)
    right = sum(said == "right" for said in found.values())
    left_out = sum(said.startswith("not started") for said in found.values())
    print(f"{right} right, {left_out} not started, {len(found) - right - left_out} wrong")
    return len(found) - right - left_out


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
