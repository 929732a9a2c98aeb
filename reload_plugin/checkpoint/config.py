"""Whether a folder of weights is for the model that the engine runs: its config.json against the engine's.

A cold start on a folder obeys its config.json, so weights that fit by shape may still be another model
(other rotary settings, another norm epsilon). What a config says beside the model does not count.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from .. import vllm_api
from ..errors import SHOWN, SourceError
from .io.json_files import open_regular

Config = dict[str, Any]

CONFIG = "config.json"
QUANTIZATION = "hf_quant_config.json"
"""Where ModelOpt puts the quantization when it is not in config.json."""

_FIRST = ("architectures", "model_type", "quantization_config")
"""What is named first among the differences, because the others follow from it."""

_ORIGIN = """
    _name_or_path name_or_path model_name transformers_version _commit_hash auto_map custom_pipelines
    torch_dtype dtype unsloth_version unsloth_fixed finetuning_task task_specific_params id2label label2id
"""
_USE = """
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id tokenizer_class prefix generation_config
    use_cache return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids suppress_tokens begin_suppress_tokens num_return_sequences remove_invalid_values
    exponential_decay_length_penalty
"""
_TRAINING = """
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    experts_implementation _experts_implementation _experts_implementation_internal torchscript
    tf_legacy_loss use_bfloat16 gradient_checkpointing initializer_range initializer_factor
    initializer_cutoff_factor embedding_initializer_range output_router_logits router_aux_loss_coef
    router_z_loss_coef aux_loss_alpha seq_aux pruned_heads dropout layerdrop classifier_dropout
    attention_dropout hidden_dropout activation_dropout attention_probs_dropout_prob hidden_dropout_prob
    resid_pdrop embd_pdrop attn_pdrop summary_first_dropout resid_dropout embd_dropout embedding_dropout
    residual_dropout
"""
_NO_MATTER = frozenset(f"{_ORIGIN} {_USE} {_TRAINING}".split())
"""Keys that do not change what the engine computes, at any depth: where a model came from and how it is
stored, what is done around it (tokens, sampling, outputs), how transformers computes and trains it."""

_MAKING = """
    meta dataset tokenizer batch_size damp_percent model_name_or_path model_file_base_name
    global_compression_ratio use_exllama exllama_config max_input_length cache_block_outputs
"""
_NO_MATTER_IN_QUANTIZATION = frozenset(f"{_MAKING}".split())
"""How a quantization was made, and how others run it; here the keys above do matter."""


def start_config(model_config: Any) -> Config | None:
    """The config.json that an engine has just started with, as it is on disk; None when there is none.

    Also None when the engine takes its config from elsewhere, so that a folder's own would not count.
    """
    path = getattr(model_config, "model", "")
    elsewhere = getattr(model_config, "hf_config_path", None)
    if not path or (elsewhere and elsewhere != path):
        return None
    try:
        return _read(path, getattr(model_config, "revision", None))
    except SourceError:
        return None


def check_config(path: str, model_config: Any, start: Config | None) -> None:
    """Refuse a folder that a cold start would make another model of. Folders without config.json pass.

    Args:
        path: folder, or repository in the local cache; the engine's own at the engine's revision.
        model_config: config of the served model, for its ``hf_overrides``.
        start: what ``start_config`` gave when the engine started.

    Raises:
        SourceError: lists the settings that differ; or the folder's config.json cannot be read.

    """
    found = None if start is None else _read(path, vllm_api.revision_of(path, model_config))
    if start is None or found is None:
        return
    try:
        different = differences(start, found, model_config)
    except RecursionError as error:
        raise SourceError(f"{CONFIG} in {path} is nested too deeply. Write it again.") from error
    if not different:
        return
    listed = [f"{key} is {_brief(new)} and was {_brief(old)}" for key, (old, new) in different.items()]
    more = f", and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    raise SourceError(
        f"{path} holds another model than the engine was started with. By {CONFIG}: "
        f"{', '.join(listed[:SHOWN])}{more}. Start an engine on that folder; or, where only its weights "
        f"count, give them in a folder without {CONFIG}."
    )


def differences(start: Config, found: Config, model_config: Any = None) -> dict[str, tuple[Any, Any]]:
    """Setting -> (value at the start, value now), for settings that change the model.

    A key that is missing equals its default, where vLLM has a class for the config that knows it.
    """
    overrides = getattr(model_config, "hf_overrides", None)
    pair = [_overridden(raw, overrides) for raw in (start, found)]
    plain = _different(*pair)
    if not plain:
        return {}
    filled = [_filled(raw, model_config) for raw in pair]
    if filled[0] is None or filled[1] is None:
        return _in_order(plain)
    different = _different(filled[0], filled[1])
    if pair[0].get("architectures") is None or pair[1].get("architectures") is None:
        different.pop("architectures", None)  # then vLLM chooses by model_type
    return _in_order(different)


def _filled(raw: Config, model_config: Any) -> Config | None:
    """A config with its defaults, or None. The quantization stays as it is: transformers need not know it."""
    model = {key: value for key, value in raw.items() if key != "quantization_config"}
    full = vllm_api.full_config(model, model_config)
    return None if full is None else full | {"quantization_config": raw.get("quantization_config")}


def _read(path: str, revision: str | None) -> Config | None:
    config = _read_json(path, CONFIG, revision)
    if config is not None and config.get("quantization_config") is None:
        config["quantization_config"] = _read_json(path, QUANTIZATION, revision)
    return config


def _read_json(path: str, name: str, revision: str | None) -> Config | None:
    file = vllm_api.local_file(path, name, revision)
    if file is None:
        return None
    try:
        with open_regular(file) as handle:
            found = json.loads(handle.read(), object_hook=_number)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{file} is not a model's config: {error}. Write it again, or take it away."
        ) from error
    return found


def _number(entry: Config) -> Any:
    """transformers writes infinity as ``{"__float__": "Infinity"}``."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry


def _overridden(raw: Config, overrides: Any) -> Config:
    """A copy of a config with the engine's ``hf_overrides`` in it, which go before what a folder says."""
    found = copy.deepcopy(raw)
    if isinstance(overrides, Mapping):
        _update(found, overrides)
    return found


def _update(config: Config, overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _update(config[key], value)
        else:
            config[key] = value


def _different(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    settings = [dict(_settings(config)) for config in (old, new)]
    pairs = {key: (settings[0].get(key), settings[1].get(key)) for key in settings[0] | settings[1]}
    return {key: pair for key, pair in pairs.items() if not _equal(*pair)}


def _settings(
    config: Config, prefix: str = "", drop: frozenset[str] = _NO_MATTER
) -> Iterator[tuple[str, Any]]:
    """Every setting that counts, under its dotted path."""
    for key, value in config.items():
        if key in drop:
            continue
        if isinstance(value, dict):
            inside = _NO_MATTER_IN_QUANTIZATION if key == "quantization_config" else drop
            yield from _settings(value, f"{prefix}{key}.", inside)
        else:
            yield prefix + key, value


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        return len(old) == len(new) and all(map(_equal, old, new))
    return bool(old == new) or (old != old and new != new)  # NaN


def _in_order(different: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    def rank(key: str) -> tuple[int, str]:
        top = key.partition(".")[0]
        return (_FIRST.index(top) if top in _FIRST else len(_FIRST), key)

    return {key: different[key] for key in sorted(different, key=rank)}


def _brief(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
