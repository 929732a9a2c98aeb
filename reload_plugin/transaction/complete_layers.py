"""Layers that are complete while the model's loader still runs, and what a loader may not do to them."""

from __future__ import annotations

from torch import nn

from ..load.completeness import Completeness
from ..plan.tracer import LoadTrace
from ..record.staged_group import StagedGroup


class CompleteLayers:
    """Keeps the model's loader from layers that are complete.

    Without a loader there is nothing to keep from them, and nothing is noted.

    Args:
        trace: refuses a loader that reads or writes their parameters.
        completeness: tells whether a loader runs.

    """

    def __init__(self, trace: LoadTrace, completeness: Completeness) -> None:
        self._trace, self._completeness = trace, completeness
        self._parameters: list[tuple[str, nn.Module, dict[str, nn.Parameter | None]]] = []
        """Layers, and the parameters they had when they were complete."""

    @property
    def _has_loader(self) -> bool:
        return self._completeness.copy_plan is None

    def guard(self, group: StagedGroup) -> None:
        """Keep the model's loader from what the layers of a group hold now: it is not what was loaded."""
        if not self._has_loader or not group.group.tensors:
            return
        for name, layer in group.layers:
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    self._trace.note_complete(parameter, f"{name}.{key}", group.group.tensors[0].name)

    def remember(self, group: StagedGroup) -> None:
        """Remember the parameters that the layers of a group have."""
        if self._has_loader:
            self._parameters += [(name, layer, dict(layer._parameters)) for name, layer in group.layers]

    def put_back(self) -> list[str]:
        """Give layers the parameters they had, should a loader have given them others.

        Returns the names of those layers.
        """
        changed = []
        for name, layer, parameters in self._parameters:
            now = layer._parameters
            if now.keys() != parameters.keys() or any(now[key] is not parameters[key] for key in now):
                now.clear()
                now.update(parameters)
                changed.append(name)
        return changed

    def forget(self) -> None:
        """Let go of the layers."""
        self._parameters = []
