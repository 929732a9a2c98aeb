"""What is known of the checkpoint that an engine started with."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import Source, TensorInfo, open_start
from ..checkpoint.formats.safetensors_files import SafetensorsSource
from ..errors import ReloadError
from ..plan.checkpoint_plan import PlanUnavailableError, make_plan
from ..plan.known_checkpoint import KnownCheckpoint
from ..record.model_record import ModelRecord


@dataclass
class StartedFrom:
    """The engine's own checkpoint: looked at when it had just started, listed and planned when first
    asked.
    """

    stamps: Mapping[str, tuple[int, int, int]] | None = None
    """Weight file -> size, time and inode, when the engine had just started from it."""
    config: dict[str, Any] | None = None
    """The config.json, as it was on disk then."""
    _listing: Sequence[TensorInfo] | None = field(default=None, repr=False)
    _shapes: dict[str, tuple[int, ...]] | None = field(default=None, repr=False)
    _coverage: dict[str, str] | None = field(default=None, repr=False)

    def source(self, model: nn.Module, record: ModelRecord) -> Source | None:
        """The checkpoint in the engine's own model path, if it can be listed."""
        try:
            source = open_start(record.vllm_config, record.model_config, model)
        except ReloadError:
            return None
        return source if source.infos() is not None else None

    def remember_listing(self, model: nn.Module, record: ModelRecord) -> None:
        """List it now, when the engine has just started from it: its files may be gone when an export asks
        for names. Reads headers only, and nothing that is not on this machine.
        """
        if self.stamps is not None:
            self._listing = tuple(_as_loaded(self.source(model, record))) or None

    def listing(self, model: nn.Module, record: ModelRecord) -> Sequence[TensorInfo]:
        """Names, shapes and dtypes in the order in which a cold start loads them; empty when it cannot be
        listed.
        """
        return _as_loaded(self.source(model, record)) if self._listing is None else self._listing

    def shapes(self, model: nn.Module, record: ModelRecord) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape, in the order in which a cold start loads them; empty when it cannot be listed."""
        if self._shapes is None:
            self._shapes = {info.name: info.shape for info in self.listing(model, record)}
        return self._shapes

    def was_written(self, model: nn.Module, record: ModelRecord) -> Callable[[str], str | None]:
        """How completely that checkpoint writes a parameter; planned when first asked."""

        def was_written(parameter: str) -> str | None:
            if self._coverage is None:
                self._coverage = {}
                with contextlib.suppress(PlanUnavailableError, ReloadError):
                    if (source := self.source(model, record)) is not None:
                        known = KnownCheckpoint(start_shapes=self.shapes(model, record))
                        plan = make_plan(model, source.infos() or (), source.description, known)
                        self._coverage = plan.coverage
            return self._coverage.get(parameter)

        return was_written

    def known(self, model: nn.Module, record: ModelRecord) -> KnownCheckpoint:
        """What the start tells of any other checkpoint."""
        return KnownCheckpoint(
            was_written=self.was_written(model, record), start_shapes=self.shapes(model, record)
        )


def _as_loaded(source: Source | None) -> Sequence[TensorInfo]:
    """What a source lists, in the order in which vLLM loads it at a start: file by file, and of safetensors
    by name in each (``safetensors_weights_iterator``, ``safe_open.keys``).
    """
    infos = (source.infos() if source is not None else None) or ()
    if not isinstance(source, SafetensorsSource):
        return infos
    file_of = source.file_of
    files = {path: place for place, path in enumerate(sorted(set(file_of.values()), key=_with_numbers))}
    return sorted(infos, key=lambda info: (files[file_of[info.name]], info.name))


def _with_numbers(path: str) -> list[tuple[int, str]]:
    """To sort files by: numbers in their names count as numbers."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]
