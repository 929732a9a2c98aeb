"""Checkpoints that are known and not read here, each with what to use instead."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from pathlib import Path

from ...errors import SourceError
from ..io.json_files import open_regular

_ITERATION = re.compile(r"iter_\d{7}")
_ZERO_FILE = re.compile(r".*zero_pp_rank_\d+_mp_rank_\d+.*\.pt|mp_rank_\d+_model_states\.pt")
_ZERO_FOLDER = re.compile(r"global_step\d+")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]+=*\s*")


def refuse_megatron(folder: Path, present: Collection[str]) -> None:
    """Raise SourceError for a checkpoint of Megatron-LM or Megatron-Core."""
    core = "common.pt" in present and "metadata.json" in present
    steps = [name for name in present if _ITERATION.fullmatch(name)]
    ranks = any(re.fullmatch(r"mp_rank_\d+(_\d+)*", name) for name in present)
    if core or steps or "latest_checkpointed_iteration.txt" in present or ranks:
        raise SourceError(
            f"{folder} is a Megatron checkpoint: its tensors are cut and named as the trainer's ranks hold "
            "them, and only Megatron's own code knows how. Export it with Megatron-Bridge: "
            "AutoBridge.from_hf_pretrained(<the Hugging Face model>).export_ckpt("
            f"megatron_path={str(folder)!r}, hf_path='<folder>') and give that folder; or pass "
            "bridge.export_hf_weights(model, cpu=True), an iterator, as weights_iterator."
        )


def refuse_deepspeed(folder: Path, present: Collection[str]) -> None:
    """Raise SourceError for a checkpoint of DeepSpeed's ZeRO."""
    inside = any(_ZERO_FILE.fullmatch(name) for name in present)
    above = [name for name in present if _ZERO_FOLDER.fullmatch(name) and (folder / name).is_dir()]
    if not inside and not above and "zero_to_fp32.py" not in present:
        return
    root = folder.parent if inside and not above else folder
    raise SourceError(
        f"{folder} is a DeepSpeed ZeRO checkpoint: its parameters are flattened and cut over the ranks. "
        "Convert it with the script that DeepSpeed puts beside it: "
        f"python {root / 'zero_to_fp32.py'} {root} <folder> --safe_serialization, and give that folder; or "
        "save with stage3_gather_16bit_weights_on_model_save=true."
    )


def refuse_adapter(where: Path, present: Collection[str]) -> None:
    """Raise SourceError for a LoRA adapter without the weights of the model below it."""
    if "adapter_config.json" in present or any(name.startswith("adapter_model.") for name in present):
        raise SourceError(
            f"{where} is a LoRA adapter without the weights of the model it was trained on. Serve it beside "
            "them (vLLM: --enable-lora, and /v1/load_lora_adapter); or merge it and give the merged folder: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(<adapter>).merge_and_unload()"
            ".save_pretrained(<folder>)."
        )


def refuse_gguf(files: Collection[str]) -> None:
    """Raise SourceError where the weights are in GGUF."""
    if files:
        raise SourceError(
            f"{sorted(files)[0]} is a GGUF file, whose tensors are in blocks of llama.cpp's own "
            "quantizations. Give the safetensors it was made from; or transformers' "
            "AutoModelForCausalLM.from_pretrained(<folder>, gguf_file=<file>), and "
            "reload_plugin.checkpoint.from_transformers(model).read() as weights_iterator."
        )


def refuse_text(file: Path) -> None:
    """Raise SourceError for a pickle or safetensors that somebody turned into base64 text."""
    try:
        with open_regular(file) as handle:
            head = handle.read(4096)
    except (OSError, ValueError):
        return
    line = head.splitlines()[0] if head else b""
    if len(line) < 16 or not _BASE64.fullmatch(line):
        return
    try:
        inside = base64.b64decode(
            line[: len(line) // 4 * 4], altchars=b"-_" if b"-" in line or b"_" in line else None
        )
    except (binascii.Error, ValueError):
        return
    if inside[:1] == b"\x80" or inside[:4] == b"PK\x03\x04" or inside[8:9] == b"{":
        raise SourceError(
            f"{file} is a pickle or safetensors file in base64, as it travels in text messages. It is "
            f"not unpickled here. Decode it (base64 -d {file} > <file>) and give the result, if that is "
            "safetensors or a file of torch.save; or decode it where it came from and pass the "
            "(name, tensor) pairs as weights_iterator."
        )
