"""Filling models that FSDP shards from checkpoints of any layout."""

from .restore import RestoreReport, restore_fsdp

__all__ = ["RestoreReport", "restore_fsdp"]
