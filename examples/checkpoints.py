"""Write tiny random checkpoints: tied embeddings, a mixture of experts, INT8."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

# Wider than the usual 0.02, so that two random models answer differently from the first token on.
SPREAD = 0.1
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS = {
    "dense": "dense, tied embeddings",
    "moe": "mixture of experts",
    "int8": "INT8 weights and activations",
}


def write(kind: str, seed: int, folder: Path) -> Path:
    """Write a checkpoint of `kind` (a key of `KINDS`) to `folder`; the seed decides every weight."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = _model(kind).to(torch.bfloat16)
    model.save_pretrained(folder)
    if kind == "int8":
        _quantize(model, folder)
    return folder


def _model(kind: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

    config = {
        "dense": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
        "moe": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        "int8": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    }[kind]()
    return AutoModelForCausalLM.from_config(config)


def _quantize(model: torch.nn.Module, folder: Path) -> None:
    """Rewrite the checkpoint in `folder` as compressed-tensors W8A8, with activations quantized per token.

    For each linear layer but the head: `weight` int8 [out, in] and `weight_scale` bf16 [out, 1], so that
    weight ≈ int8 · scale.
    """
    tensors = dict(model.state_dict())
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for name in linears:
        weight = tensors[f"{name}.weight"].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[f"{name}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale.to(torch.bfloat16)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _w8a8()
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _w8a8() -> dict:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": int8 | {"strategy": "channel", "dynamic": False},
                "input_activations": int8 | {"strategy": "token", "dynamic": True},
            }
        },
    }
