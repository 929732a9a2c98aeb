"""The report of a reload."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ReloadReport(BaseModel):
    """What one reload did on one rank."""

    model_config = ConfigDict(frozen=True)

    source: str
    policy: str
    """``staged``: all layers were committed at the end; ``streaming``: each layer when it was processed."""
    old_generation: str = "host"
    """The rollback source until the commit: ``host`` memory, a ``spill`` file, the old source that could be
    ``reread``, or ``none``."""
    tensors: int
    """Checkpoint tensors received."""
    nbytes: int
    """Their bytes."""
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
