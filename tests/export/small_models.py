"""Tiny random models of transformers, by what has to be undone when they are saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
ERNIE_TEXT = {
    **DECODER,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": [8, 4],
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
ERNIE_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4}

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
        "qwen3_moe", "one-to-many", _made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **DECODER, **QWEN_EXPERTS)
    ),
)
