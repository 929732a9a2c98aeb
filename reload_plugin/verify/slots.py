"""What a reload did, as a report: nothing is silent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..plan.tracer import Loaded, Mismatches
from ..record.staging import StagedGroup, StagedStorage
from ..tensors import storage_id


class ReloadReport(BaseModel):
    """Account of one reload on one rank."""

    model_config = ConfigDict(frozen=True)

    source: str
    policy: str
    """``staged``: nothing was committed before all was done; ``streaming``: each layer when it was done."""
    old_generation: str = "host"
    """Where the way back was until the commit: ``host`` memory, a ``spill`` file or the old source that
    could be ``reread``, or ``none``."""
    tensors: int
    """Checkpoint tensors received."""
    nbytes: int
    """Their bytes."""
    replayed: int = 0
    """Those of ``tensors`` that were copied to their places without the model's loader: by the plan, or by
    routes learnt before, or by name where they came in kernel format. All others took the loader."""
    computed: int = 0
    """Those that took it because it makes other values of them (Mamba's ``-exp(A_log)``, casts), and will
    at every reload. The rest, if there is a rest, took it because their routes were not known."""
    layers: int
    """Groups of layers that were processed and committed."""
    kept: dict[str, str] = Field(default_factory=dict)
    """Parameter that no weight was sent for and that keeps its constructor's value -> rule."""
    ignored: dict[str, str] = Field(default_factory=dict)
    """Checkpoint name that the model has no use for -> rule."""
    moved: tuple[str, ...] = ()
    """Tensors whose layout changed, so that their address could not be kept."""
    staging_bytes: int
    """Largest amount of load-format and uncommitted kernel-format memory held at one time."""
    seconds: dict[str, float]
    """Wall seconds by stage: plan, read (files, or the iterator that was passed), load (bringing layers into
    load format, and loaders), process, agree (waiting for other ranks), commit; finish; digest; total.

    What is served changes during ``commit`` and at no other time, unless the policy is ``streaming``.
    ``finish`` is the whole call that ends an update, the one that wants a pause: what was not known to be
    complete before, attention layers and the model's own hook are processed in it, then it waits for the
    other ranks, then it commits. A worker does one thing at a time, so requests wait for each chunk too.
    """
    version: int
    """How many reloads this model has had; 0 is the cold start."""
    weight_version: str | None = None
    """The caller's name for the weights served now."""
    digest: str | None = None
    """Of what the kernels read now; see ``digest.digest_of``. None with ``digest=False`` and ``later``."""
    spilled_bytes: int = 0
    """Bytes that went through a file because they came in an order that staging had no room for."""
    partial: bool = False
    """Only the weights that came have changed."""
    companions: int = 0
    """Weights read again from the old source, because those that came share a layer with them."""
    caches: dict[str, str] = Field(default_factory=dict)
    """Cache that depends on the weights -> whether it was reset."""


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
    if getattr(text, "tie_word_embeddings", False) and _HEAD.search(name):
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


def check_slots(
    stages: Iterable[StagedGroup],
    loaded: Loaded,
    mismatches: Mismatches,
    rule_of: Callable[[str, tuple[int, ...]], str | None],
    was_written: Callable[[str], str | None],
) -> tuple[dict[str, str], dict[str, str]]:
    """Account for every parameter and every weight; offenders go into ``mismatches``.

    Args:
        stages: all groups, loaded.
        loaded: what the stream brought.
        mismatches: receives missing and unexpected weights.
        rule_of: the rule by which a weight nobody used may be ignored.
        was_written: how completely the checkpoint that the engine started with writes a parameter:
            ``whole``, ``part`` or ``none``; None when nothing is known.

    Returns:
        (kept, ignored), both name -> rule, as in the report.

    """
    kept: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for stage in stages:
        for storage in stage.storages:
            if storage.primary.is_parameter and not storage.coverage.complete:
                _check_parameter(stage, storage, mismatches, kept, was_written)
    rejected = mismatches.unexpected.keys() | mismatches.misshapen.keys()
    # What landed was read to where it is used.
    used = (
        loaded.written.keys()
        | loaded.in_new_parameters
        | {name for name, tensor_plan in loaded.tensor_plans.items() if tensor_plan.copies != ()}
    )
    for name, shape in loaded.shapes.items():
        if name not in used and name not in rejected:
            rule = rule_of(name, shape)
            if rule is None:
                mismatches.unexpected[name] = "the model's loader has no place for it"
            else:
                ignored[name] = rule
    return kept, ignored


def _check_parameter(
    stage: StagedGroup,
    storage: StagedStorage,
    mismatches: Mismatches,
    kept: dict[str, str],
    was_written: Callable[[str], str | None],
) -> None:
    record = storage.primary
    if replaced_by_loader(stage, storage):
        return
    touched = storage.coverage.touched
    if touched and not record.expected:
        return  # the rest of it is the constructor's: padding
    known = was_written(record.name)
    as_at_start = known == ("part" if touched else "none")
    unknown = known is None and not touched and not record.expected and _has_method(stage, record.layer)
    optional = unknown and (record.traced or record.name.endswith(("scale", "zero_point")))
    if as_at_start or optional:
        kept[record.name] = "not in the engine's own checkpoint" if as_at_start else "the constructor's value"
    else:
        mismatches.missing[record.name] = storage.coverage.describe_gap()


def replaced_by_loader(stage: StagedGroup, storage: StagedStorage) -> bool:
    """Whether a loader put a tensor of its own in a parameter's place (GGUF does)."""
    data = stage.loaded_data(storage.primary)
    return data is not None and data.numel() > 0 and storage_id(data) != storage.key


def _has_method(stage: StagedGroup, layer: str) -> bool:
    module = next((layer_.ref() for layer_ in stage.group.layers if layer_.name == layer), None)
    return getattr(module, "quant_method", None) is not None
