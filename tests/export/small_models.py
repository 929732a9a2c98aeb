"""Tiny random models of transformers, by what has to be undone when they are saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
ENCODER = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 32}
DECODER = {**ENCODER, "num_key_value_heads": 1, "tie_word_embeddings": False, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """One model class with its tiny config."""

    name: str
    conversion: str
    """What undoing does: many-to-one, one-to-many, …"""
    make: Callable[[], Any]
    squeezed: dict[str, int] = field(default_factory=dict)
    """End of a name -> dimension of size 1 that transformers 5.19 loses when it saves."""
    cast_buffers: bool = False
    """Whether transformers itself loads a buffer in another dtype where it offloads buffers, as 5.19 does."""


def _made(model: str, config: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        torch.manual_seed(len(model))
        built = getattr(transformers, model)(getattr(transformers, config)(**options))
        with torch.no_grad():
            for tensor in built.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape))
        return built.bfloat16().eval()

    return make


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
ERNIE = {
    "text_config": {
        **DECODER,
        "num_hidden_layers": 3,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [8, 4],
        "rope_parameters": MROPE,
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "patch_size": 4,
    },
}
KIMI = {
    "text_config": {
        **DECODER,
        "model_type": "deepseek_v3",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
    },
    "projection_hidden_size": 16,
}
STEP = {
    "text_config": {
        **DECODER,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "share_expert_dim": 8,
        "num_sliding_attention_heads": 2,
    },
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 4,
        "max_position_embeddings": 16,
    },
}
QWEN_VL = {
    "text_config": {**DECODER, **QWEN_EXPERTS, "num_hidden_layers": 1, "rope_parameters": MROPE},
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "patch_size": 4,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}
TIED = {**DECODER, "tie_word_embeddings": True}
NARROW = {**DECODER, "intermediate_size": 1}

FAMILIES = (
    Family("nomic_bert", "many-to-one", _made("NomicBertModel", "NomicBertConfig", **ENCODER)),
    Family("gte", "many-to-one", _made("GteModel", "GteConfig", **ENCODER)),
    Family(
        "jina_embeddings_v3",
        "many-to-one",
        _made("JinaEmbeddingsV3Model", "JinaEmbeddingsV3Config", **ENCODER),
    ),
    Family("mixtral", "one-to-many", _made("MixtralForCausalLM", "MixtralConfig", **DECODER, **EXPERTS)),
    Family(
        "mixtral, inner size 1",
        "one-to-many",
        _made("MixtralForCausalLM", "MixtralConfig", **NARROW, **EXPERTS),
        {".w1.weight": 0, ".w3.weight": 0, ".w2.weight": 1},
    ),
    Family(
        "qwen3_moe", "one-to-many", _made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **DECODER, **QWEN_EXPERTS)
    ),
    Family(
        "ernie4_5_vl_moe",
        "m-to-n, transposed",
        _made("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VLMoeConfig", **ERNIE),
    ),
    Family(
        "kimi_k25",
        "many-to-one with a rope permutation, one-to-many",
        _made("Kimi_K25ForConditionalGeneration", "Kimi_K25Config", **KIMI),
        cast_buffers=Version(version("transformers")) < Version("5.24"),
    ),
    Family(
        "step3p7",
        "many-to-one with a rope permutation, one-to-many",
        _made("Step3p7ForConditionalGeneration", "Step3p7Config", **STEP),
    ),
    Family(
        "qwen3_vl_moe",
        "transposed",
        _made("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", **QWEN_VL),
    ),
    Family("llama, tied", "none", _made("LlamaForCausalLM", "LlamaConfig", **TIED)),
)
