"""Every model, quantization and option that the tests reload: one row of data each.

To add a case, name a config. `own` says what vLLM's reload does with it when this plugin is switched off;
it proves that the oracle can fail, and the table in tests/README.md is made from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests import checkpoints
from tests.checkpoints import Builder, Config

RIGHT, MOVED, WRONG, RAISES, DIES = "right", "moved", "wrong", "raises", "dies"


@dataclass(frozen=True)
class Case:
    """One engine to reload.

    `config` is what `builder` turns into a checkpoint. `own` is the verdict on vLLM's own reload:
    `moved` means that all values are right, but objects were replaced that compiled code or a CUDA graph may
    hold.
    """

    name: str
    config: Config
    builder: Builder = checkpoints.write_transformers
    engine_kwargs: Mapping[str, object] = field(default_factory=dict)
    own: str = MOVED
    needs: str = ""
    """An operator of vLLM's kernels that it cannot start without."""
    unstartable: Mapping[str, str] = field(default_factory=dict)
    """Minor versions of vLLM whose CPU build cannot start it, each with the reason."""

    @property
    def pooling(self) -> bool:
        """Whether the engine answers with embeddings and not with tokens."""
        return self.engine_kwargs.get("runner") == "pooling"

    @property
    def starts_on_dummy(self) -> bool:
        """Whether the engine starts on values of vLLM's own and sees checkpoint A by a reload only."""
        return self.engine_kwargs.get("load_format") == "dummy"


SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GQA = SIZES | {"num_key_value_heads": 2}
EXPERTS = GQA | {"num_experts": 4, "num_experts_per_tok": 2}
MAMBA = GQA | {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}

UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}

LLAMA = GQA | {"model_type": "llama"}
LLAMA_TIED = LLAMA | TIED
QWEN2 = GQA | UNTIED | {"model_type": "qwen2"}
QWEN3_TIED = GQA | TIED | {"model_type": "qwen3", "head_dim": 32}
MISTRAL = GQA | {"model_type": "mistral", "sliding_window": 16}
GEMMA2 = GQA | {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text"}
PHI3 = GQA | {"model_type": "phi3", "pad_token_id": 0}
GPT2 = {"model_type": "gpt2", "vocab_size": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = SIZES | {"model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 128}
GPT_NEOX = SIZES | {"model_type": "gpt_neox"}
STARCODER2 = GQA | {"model_type": "starcoder2"}
OLMO2 = GQA | {"model_type": "olmo2"}
COHERE = GQA | {"model_type": "cohere", "use_qk_norm": True}
GRANITE = GQA | {"model_type": "granite"}
STABLELM = GQA | {"model_type": "stablelm", "use_qkv_bias": True}

MIXTRAL = GQA | {"model_type": "mixtral", "num_local_experts": 4}
# The CPU kernel wants multiples of 32 and fills up with zeros that no checkpoint has.
MIXTRAL_PADDED = MIXTRAL | {"intermediate_size": 80}
QWEN2_MOE = EXPERTS | {
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
QWEN3_MOE = EXPERTS | {"model_type": "qwen3_moe", "moe_intermediate_size": 64, "head_dim": 32}
OLMOE = EXPERTS | {"model_type": "olmoe"}
DEEPSEEK_V2 = SIZES | {
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
DEEPSEEK_V3 = DEEPSEEK_V2 | {
    "model_type": "deepseek_v3",
    "q_lora_rank": 64,
    "topk_method": "noaux_tc",
    "n_group": 2,
    "topk_group": 1,
}
GPT_OSS = GQA | {
    "model_type": "gpt_oss",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}
QWEN3_NEXT = EXPERTS | {
    "model_type": "qwen3_next",
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 32,
    "state_size": 16,
    "n_groups": 1,
}
FALCON_H1 = MAMBA | {"model_type": "falcon_h1", "head_dim": 32, "mamba_d_ssm": 256}
NEMOTRON_H = GQA | {
    "model_type": "nemotron_h",
    "layers_block_type": ["mamba", "attention", "mlp"],
    "num_hidden_layers": 3,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 1,
}
LFM2 = GQA | {
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention"],
    "conv_L_cache": 3,
    "conv_dim": 128,
    "block_dim": 128,
    "block_ff_dim": 256,
    "block_auto_adjust_ff_dim": False,
}
GRANITE_HYBRID = MAMBA | {
    "model_type": "granitemoehybrid",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 64,
    "layer_types": ["mamba", "attention"],
}

# torchao's int8 weight-only, quantized from a bf16 checkpoint while it loads.
TORCHAO = {
    "quantization": "torchao",
    "hf_overrides": {"quantization_config_dict_json": checkpoints.TORCHAO_INT8},
}

INT4 = "cpu_gemm_wna16"
MLA_REFUSED = "MLA is not supported on CPU"
NO_MLA = "its MLA imports a function that the CPU build lacks"
NO_TRITON = "its kernels ask for a function that the stand-in for Triton lacks"
BLOCK_SIZE = "its attention kernel for AMX refuses the block size"

CASES = (
    Case("llama", LLAMA),
    Case("llama_tied", LLAMA_TIED, own=WRONG),
    Case("llama_dummy", LLAMA, engine_kwargs={"load_format": "dummy"}, own=RAISES),
    Case("qwen2", QWEN2),
    Case("qwen3_tied", QWEN3_TIED, own=WRONG),
    Case("mistral", MISTRAL),
    Case("gemma2", GEMMA2),
    Case("gemma3", GEMMA3, own=WRONG, unstartable=dict.fromkeys(("0.26", "0.27", "0.28"), BLOCK_SIZE)),
    Case("phi3", PHI3),
    Case("gpt2", GPT2, own=WRONG),
    Case("opt", OPT, own=WRONG),
    Case("gpt_neox", GPT_NEOX),
    Case("starcoder2", STARCODER2, own=WRONG),
    Case("olmo2", OLMO2),
    Case("cohere", COHERE),
    Case("granite", GRANITE),
    Case("stablelm", STABLELM),
    Case("mixtral", MIXTRAL, own=WRONG),
    Case("mixtral_padded", MIXTRAL_PADDED, own=RAISES),
    Case("qwen3_moe", QWEN3_MOE, own=WRONG),
    Case("olmoe", OLMOE, own=WRONG),
    Case(
        "deepseek_v2",
        DEEPSEEK_V2,
        own=WRONG,
        unstartable=dict.fromkeys(("0.24", "0.25", "0.26", "0.27"), MLA_REFUSED) | {"0.28": NO_MLA},
    ),
    Case("deepseek_v3", DEEPSEEK_V3, own=WRONG),
    Case("qwen2_moe", QWEN2_MOE, own=WRONG),
    Case("gpt_oss", GPT_OSS, own=WRONG),
    Case("qwen3_next", QWEN3_NEXT, own=WRONG),
    Case(
        "mamba2",
        MAMBA2,
        own=WRONG,
        unstartable=dict.fromkeys(("0.24", "0.25", "0.26"), NO_TRITON),
    ),
    Case("falcon_h1", FALCON_H1, own=WRONG),
    Case("nemotron_h", NEMOTRON_H, own=WRONG),
    Case("lfm2", LFM2, own=WRONG),
    Case("granitemoehybrid", GRANITE_HYBRID, own=WRONG),
    Case("w8a8_dynamic", LLAMA, checkpoints.write_w8a8_dynamic, own=WRONG),
    Case("w8a8_static", LLAMA, checkpoints.write_w8a8_static, own=DIES),
    Case("w8a8_asymmetric", LLAMA, checkpoints.write_w8a8_static_asymmetric, own=DIES),
    Case("w4a16", LLAMA, checkpoints.write_w4a16, needs=INT4),
    Case("gptq", LLAMA, checkpoints.write_gptq, needs=INT4),
    Case("awq", LLAMA, checkpoints.write_awq, needs=INT4),
    Case("torchao_int8", LLAMA, engine_kwargs=TORCHAO),
    Case("online_linear", LLAMA, engine_kwargs={"quantization": "test_int8_after"}),
    Case("online_linear_tied", LLAMA_TIED, engine_kwargs={"quantization": "test_int8_after"}, own=WRONG),
    Case("online_experts", QWEN3_MOE, engine_kwargs={"quantization": "test_int8_after"}),
    Case("meta_linear", QWEN2, engine_kwargs={"quantization": "test_int8_meta"}),
    Case("meta_linear_tied", LLAMA_TIED, engine_kwargs={"quantization": "test_int8_meta"}, own=WRONG),
    Case("meta_experts", QWEN3_MOE, engine_kwargs={"quantization": "test_int8_meta"}),
    Case(
        "meta_dummy",
        QWEN3_MOE,
        engine_kwargs={"quantization": "test_int8_meta", "load_format": "dummy"},
        own=RAISES,
    ),
    Case(
        "minilm",
        {},
        checkpoints.write_minilm,
        engine_kwargs={"runner": "pooling", "load_format": "dummy", "skip_tokenizer_init": False},
        own=RAISES,
    ),
)


def case_named(name: str) -> Case:
    """The row with this name; KeyError lists nothing else, so look at `CASES`."""
    return {case.name: case for case in CASES}[name]
