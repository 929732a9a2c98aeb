"""Where the tensors of the served generation can still be read as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..checkpoint import DummyWeights, FileSource, Source, TensorInfo, held_open, overlaid_sources
from ..errors import SourceError
from ..report import Tier
from ..transaction.engine_state import EngineState
from ..transaction.rollback import has_rollback_source


class GenerationSources:
    """The names, shapes and dtypes of the served generation, and what still holds its bytes.

    Files are held open while entered.

    Args:
        model: recorded.
        state: of the model.

    """

    def __init__(self, model: nn.Module, state: EngineState) -> None:
        has_rollback_source(model, state)  # for what the engine started from
        self._state = state
        self.listing: dict[str, TensorInfo] = {}
        """Every tensor of the generation; empty if nothing tells."""
        self._owner: dict[str, Source] = {}
        self._held = contextlib.ExitStack()
        for layer in overlaid_sources(state.rollback_source):
            if isinstance(layer, DummyWeights):
                continue
            readable = layer.unchanged()
            for info in layer.infos() or ():
                self.listing[info.name] = info
                self._owner.pop(info.name, None)
                if readable:
                    self._owner[info.name] = layer
        if not self.listing:
            infos = state.plans.last_listing() or state.start.listing(model, state.record)
            self.listing = {info.name: info for info in infos}

    def __enter__(self) -> GenerationSources:
        if self._owner:
            with contextlib.suppress(OSError, SourceError):  # of files that changed nothing is read
                self._held.enter_context(held_open(self._state.rollback_source))
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    @property
    def description(self) -> str:
        """What is served, for messages and the report."""
        return self._state.generation.source

    @property
    def folder(self) -> str | None:
        """Where the files of the generation are, the uppermost first; None if it has none."""
        layers = [one for one in overlaid_sources(self._state.rollback_source) if isinstance(one, FileSource)]
        return layers[-1].description if layers else None

    def tier(self, name: str) -> Tier | None:
        """``source`` or ``kept`` where the bytes of a tensor can be read; None where they cannot."""
        owner = self._owner.get(name)
        if owner is None:
            return None
        return "source" if isinstance(owner, FileSource) else "kept"

    def read(self, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Tensors as they were. The caller owns them.

        Raises:
            SourceError: a file changed or cannot be read.

        """
        found: dict[str, torch.Tensor] = {}
        by_owner: dict[int, list[str]] = {}
        for name in names:
            by_owner.setdefault(id(self._owner[name]), []).append(name)
        for some in by_owner.values():
            with contextlib.closing(self._owner[some[0]].read(some)) as weights:
                found.update(weights)
        return found
