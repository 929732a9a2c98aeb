"""Checkpoint weights that a model's loader passes over and that may be ignored."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from torch import nn

from .. import vllm_api
from ..record.model_record import ModelRecord

_RULES: tuple[tuple[str, str], ...] = (
    (
        "rotary table",
        r"rotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)$|\.rope\.freqs$|rotary_emb\.\w*freq\w*$",
    ),
    ("attention mask buffer", r"\.(attn|attention|self_attn)\.(bias|masked_bias)$"),
    ("position ids", r"position_ids$"),
    ("draft (MTP) layer", r"(^|\.)mtp(_|\.)"),
)


_HEAD = re.compile(r"^(?!.*\.\d+\.)(.*\.)?(lm_head|embed_out|output)\.weight$")
"""A head is in no numbered layer: those have an ``output`` of their own."""


def is_head(name: str) -> bool:
    """Whether a checkpoint name is that of a language model's head."""
    return _HEAD.search(name) is not None


def ignorable(name: str, shape: tuple[int, ...], config: Any, quantized: bool, world_size: int) -> str | None:
    """The rule by which a weight that the model's loader passed over may be ignored, if there is one.

    Args:
        name: checkpoint name.
        shape: its shape; mask buffers have at least three dimensions, biases have one.
        config: the Hugging Face config of the model.
        quantized: whether the engine is quantized.
        world_size: number of ranks that share the model.

    """
    for rule, pattern in _RULES:
        if re.search(pattern, name) and not (rule == "attention mask buffer" and len(shape) == 1):
            return rule
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "tie_word_embeddings", False) and is_head(name):
        return "tied head"
    layers = getattr(text, "num_hidden_layers", None)
    found = re.search(r"layers\.(\d+)\.", name)
    drafts = getattr(text, "num_nextn_predict_layers", 0)
    if found and drafts and isinstance(layers, int) and int(found[1]) >= layers:
        return "draft (MTP) layer"
    if quantized and name.endswith(".bias"):
        return "unused bias of a quantized checkpoint"
    if world_size > 1 and re.search(r"experts\.\d+\.|layers\.\d+\.", name):
        return "another rank's"
    return None


def ignore_rule(
    model: nn.Module, record: ModelRecord, at_start: Container[str], name: str, shape: tuple[int, ...]
) -> str | None:
    """The rule by which a weight that the loader of a model did not use may be ignored, if there is one.

    Args:
        model: knows which names it drops.
        record: of the model.
        at_start: names in the checkpoint that the engine started with.
        name: checkpoint name.
        shape: its shape.

    """
    if name in at_start:
        return "also in the engine's own checkpoint and unused there"
    if vllm_api.passes_over(model, name):
        return "dropped by the model's or the quantization's name mapping"
    config = record.model_config
    if config is None:
        return None
    return ignorable(name, shape, config.hf_config, config.quantization is not None, record.world_size)
