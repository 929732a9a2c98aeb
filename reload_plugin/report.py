"""The reports of a reload and of an export."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ReloadReport(BaseModel):
    """What one reload did on one rank."""

    model_config = ConfigDict(frozen=True)

    source: str
    policy: str
    """``staged``: all layers were committed at the end. ``streaming``: each layer when it was processed;
    ``undo``: the same, after its old values were saved. ``prepared``: results waited in host memory."""
    old_generation: str = "host"
    """Where the old weights were until the commit: in memory of the ``device`` that serves, in ``host``
    memory, in a ``spill`` file, in the old source that could be ``reread``, or ``none``. On a CPU both kinds
    of memory are called ``host``."""
    tensors: int
    """Checkpoint tensors received."""
    nbytes: int
    """Their bytes."""
    bytes_read: int | None = None
    """Bytes of checkpoint files that this rank read: its own part of the tensors, where a copy plan tells
    which that is. None where the weights did not come from files that this package reads."""
    replayed: int = 0
    """How many of ``tensors`` were copied without the model's loader: by the copy plan, or by name where they
    were sent in kernel format. The loader loaded all others."""
    computed: int = 0
    """How many the loader loaded because it computes other values from them (Mamba's ``-exp(A_log)``, casts);
    every reload needs it for these. It loaded the rest because the copy plan did not have them."""
    layers: int
    """Groups of layers that were processed and committed."""
    kept: dict[str, str] = Field(default_factory=dict)
    """Parameter that no weight was sent for and that keeps its constructor's value -> rule."""
    ignored: dict[str, str] = Field(default_factory=dict)
    """Checkpoint name that the model does not use -> rule."""
    moved: tuple[str, ...] = ()
    """Tensors whose address changed because their layout did."""
    staging_bytes: int
    """Largest amount of load-format and uncommitted kernel-format memory held at one time."""
    seconds: dict[str, float]
    """Wall seconds by stage: plan, read (files, or the iterator that was passed), load (bringing layers into
    load format, and loaders), process, agree (waiting for other ranks), commit; finish; digest; total.

    What is served changes during ``commit`` and at no other time, unless the policy is ``streaming``.
    ``finish`` is the whole call that ends an update: it processes layers that were not known to be complete,
    attention layers and the model's own hook, waits for the other ranks, and commits. Pause requests for it.
    A worker runs one call at a time, so requests wait for each chunk too.
    """
    version: int
    """How many reloads this model has had; 0 is the cold start."""
    weight_version: str | None = None
    """The caller's name for the weights served now."""
    digest: str | None = None
    """Of all that the kernels read; see ``digest.digest``. None with ``digest=False`` and ``later``."""
    spilled_bytes: int = 0
    """Bytes of weights that were spilled to a file because too many layers were incomplete."""
    partial: bool = False
    """Whether it was a partial update: only the weights that were sent changed."""
    companions: int = 0
    """Weights that were read again from the old source, because weights of the same layers were sent."""
    caches: dict[str, str] = Field(default_factory=dict)
    """Cache that depends on the weights -> whether it was reset."""


Tier = Literal["source", "plan", "kept", "inverse", "dequantized", "converted"]
"""How exactly an exported tensor is known.

- ``source``: its bytes as they were, copied.
- ``plan``: the copy plan inverted; the parameter that serves holds the checkpoint's bytes.
- ``kept``: from a copy in load format that was kept for this.
- ``inverse``: a known inverse of the processing, proven by loading the result again.
- ``converted``: exact, by the inverse of the operations that the model's library applied when it loaded.
- ``dequantized``: not exact; ``ExportReport.largest_error`` says by how much.
"""


class ExportReport(BaseModel):
    """What one export wrote."""

    model_config = ConfigDict(frozen=True)

    source: str
    """What the weights were taken from."""
    directory: str
    tensors: int
    nbytes: int
    """Bytes of all tensors, headers not counted."""
    tiers: dict[str, Tier]
    """Tensor -> how exactly it is known."""
    dtypes: dict[str, str]
    """Tensor -> dtype as written, by torch's name (``bfloat16``)."""
    files: dict[str, str]
    """Tensor -> the file in ``directory`` that holds it."""
    omitted: dict[str, str] = Field(default_factory=dict)
    """Tensor of the checkpoint that was not written, because nothing holds it -> why."""
    largest_error: dict[str, float] = Field(default_factory=dict)
    """Dequantized tensor -> largest absolute difference that its elements may have to those that were loaded:
    half a step of the quantization, as far as its values show the steps."""
    copied: tuple[str, ...] = ()
    """Files written beside the weights: config, tokenizer."""
    replaced: tuple[str, ...] = ()
    """Weight files of an older save that are no longer there, or were written anew."""
    peak_bytes: int
    """Bytes of the largest group of tensors that were in memory together: what they were made from, and what
    was made."""
    seconds: float


class TensorDifference(BaseModel):
    """How a checkpoint tensor differs from what an engine serves of it."""

    model_config = ConfigDict(frozen=True)

    elements: int | None
    """How many elements differ; None where the kernel format does not tell."""
    first: tuple[int, ...] | None = None
    """Index of the first of them, in the checkpoint's tensor."""


class VerifyReport(BaseModel):
    """Whether an engine serves a checkpoint, tensor by tensor."""

    model_config = ConfigDict(frozen=True)

    source: str
    serves: bool
    """Whether every tensor that the model uses is served as it is in the checkpoint, bit for bit."""
    tensors: int
    """Tensors of the checkpoint."""
    equal: int
    """Those that are served as they are."""
    different: dict[str, TensorDifference] = Field(default_factory=dict)
    """Tensor -> how it differs from what is served."""
    not_verifiable: dict[str, str] = Field(default_factory=dict)
    """Tensor of which it cannot be told -> why."""
    ignored: dict[str, str] = Field(default_factory=dict)
    """Tensor that the model does not use -> rule."""
    layers: dict[str, str] = Field(default_factory=dict)
    """Layer that serves something else than a start on the checkpoint would, for which no tensor accounts ->
    what."""
    version: int
    """Reloads committed since the start, of what was verified."""
    seconds: float
    rank: int = 0
