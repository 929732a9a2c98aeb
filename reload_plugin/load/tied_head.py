"""A head that is tied to the embedding: another head in the checkpoint is refused, and not dropped.

vLLM decides at its start whether the head has memory of its own: where ``tie_word_embeddings`` is set it has
none, unless the checkpoint that the engine starts on brings a head that differs
(``maybe_untie_word_embeddings`` and ``maybe_retie_word_embeddings``). A start on the new checkpoint would
decide anew; a reload cannot, because kernels and graphs hold the addresses of the one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from ..device.hashing import Hash
from ..plan.ignore_rules import is_head
from ..plan.known_checkpoint import KnownCheckpoint
from ..record.model_record import ModelRecord

_EMBEDDING = re.compile(r"(emb\w*|wte)\.weight$")
OTHER_HEAD = (
    "differs from the embedding, to which this engine's head is tied since its start; start an engine on "
    "these weights"
)


class TiedHead:
    """Compares the head of a checkpoint, if it has one, with its embedding; both by their digests.

    Args:
        record: of the model.
        known: what is known of the weights; a listing without a head costs nothing.

    """

    def __init__(self, record: ModelRecord, known: KnownCheckpoint) -> None:
        self.active = _is_tied(record) and _may_have_head(known)
        """Whether every weight has to be shown to ``note``."""
        self._heads: dict[str, bytes] = {}
        self._embeddings: set[bytes] = set()

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """A weight came. A matrix that may be the head or the embedding is hashed now: its memory is the
        caller's.
        """
        if not self.active or tensor.dim() != 2:
            return
        if is_head(name):
            self._heads[name] = _digest_of(tensor)
        elif _EMBEDDING.search(name):
            self._embeddings.add(_digest_of(tensor))

    def differing(self) -> dict[str, str]:
        """Heads that are not the embedding -> why they are refused. None where no embedding came to compare
        with.
        """
        if not self._embeddings:
            return {}
        return {name: OTHER_HEAD for name, digest in self._heads.items() if digest not in self._embeddings}


def differing_from_served(record: ModelRecord, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Heads that came without their embedding and are not the one that is served -> why they are refused.

    Args:
        record: of the model; one whose head is not tied has no such heads.
        weights: (checkpoint name, tensor of shape (vocabulary, hidden)). With tensor parallelism a rank has
            some rows of the embedding only: the weights are compared with none, and none is refused.

    """
    embedding = _served_embedding(record)
    found = {}
    for name, tensor in weights:
        if embedding is None or not is_head(name) or tensor.shape[1:] != embedding.shape[1:]:
            continue
        if len(tensor) > len(embedding):
            continue
        served = embedding[: len(tensor)]
        if not torch.equal(tensor.to(served.device, served.dtype), served):
            found[name] = OTHER_HEAD
    return found


def _served_embedding(record: ModelRecord) -> torch.Tensor | None:
    """The one matrix of a tied head; None where the head is not tied or the matrix cannot be told."""
    if record.world_size > 1 or not _is_tied(record):
        return None
    for layer in record.layers:
        module = layer.ref()
        weight = module._parameters.get("weight") if module is not None else None
        if weight is not None and weight.dim() == 2 and _EMBEDDING.search(f"{layer.name}.weight"):
            return weight.detach()
    return None


def _digest_of(tensor: torch.Tensor) -> bytes:
    total = Hash()
    total.add_tensor(tensor.detach().contiguous())
    return total.digest()


def _may_have_head(known: KnownCheckpoint) -> bool:
    """Whether the weights may hold a head: weights that are listed say so."""
    if not known.planned or known.copy_plan is None:
        return True
    return any(is_head(name) for name in known.copy_plan.of)


def _is_tied(record: ModelRecord) -> bool:
    """Whether head and embedding of a model are one matrix now."""
    config: Any = getattr(record.model_config, "hf_config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # Where the checkpoint of the start brought a head, vLLM took the flag out of the config, and remembers
    # that.
    untied_at_first = getattr(record.model_config, "word_embeddings_untied_by_checkpoint", False)
    if not (untied_at_first or getattr(text, "tie_word_embeddings", False)):
        return False
    modules = [(layer.name, layer.ref()) for layer in record.layers]
    weights = [(name, module._parameters.get("weight")) for name, module in modules if module is not None]
    for name, weight in weights:
        if weight is not None and is_head(f"{name}.weight"):
            return any(other is weight for place, other in weights if place != name)
    return True  # no head of its own: the model uses the embedding's module
