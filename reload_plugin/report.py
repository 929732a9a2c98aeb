"""What a reload did, as a report: nothing is silent."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


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
