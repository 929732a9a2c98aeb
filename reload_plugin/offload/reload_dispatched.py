"""New weights into a model that Accelerate has dispatched or offloaded, wherever its values are."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import FileSource, SpillFile, open_source
from ..checkpoint.formats.safetensors_files import SafetensorsSource
from ..device.ops import ops_for
from ..errors import OffloadError, ReloadError, SourceError, weights_error
from ..interrupts import deliver, held, let_through
from ..plan.source import Source, Stream, TensorInfo
from ..report import ReloadReport
from .collected import digest_of
from .memory import needs_of, refuse_if_short
from .placement import Placement
from .reload_plan import UNCHANGED, ReloadPlan, plan_reload
from .stored import InMemory, StagedWrite, pointed_at

_HOST = torch.device("cpu")
_reloads: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""Model -> how many reloads it has had."""


def reload_dispatched(
    model: nn.Module,
    weights_path: str | Path | None = None,
    weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
    *,
    check_finite: bool = False,
    point_to_files: bool = False,
    spill_dir: str | None = None,
    require_marker: str | None = None,
    weight_version: str | None = None,
) -> ReloadReport:
    """Load new weights into a model, wherever its values are: modules, mappings, files of an offload folder.

    The names are those of a checkpoint of the model, which transformers' own conversions make the model's
    weights of. All or nothing: what does not fit is named before a weight is read, and after any failure
    every value is the old one. Tied names are one weight. Afterwards the model answers bit for bit as
    ``from_pretrained`` of these weights would, in the dtypes that the model has.

    Args:
        model: a transformers model that is dispatched, offloaded, or neither; another module takes its own
            names.
        weights_path: file or folder, in any format that ``open_source`` reads.
        weights_iterator: (name, tensor) pairs instead. They go through a temporary file; a tensor may be
            overwritten as soon as the next one is asked for.
        check_finite: refuse NaN and infinity.
        point_to_files: let the index of the offloaded weights name the files of ``weights_path`` where these
            hold a weight as the model has it. They have to stay. Otherwise new files are written to the
            offload folder.
        spill_dir: folder for the old values while the reload runs, and for an iterator's weights; else
            RELOAD_PLUGIN_SPILL_DIR or the system's temporary folder.
        require_marker: name of a file that the trainer writes last.
        weight_version: a name for these weights, for the report.

    Returns:
        As of ``reload_weights``: ``layers`` are groups of weights that were converted together, ``replayed``
        those only renamed, ``computed`` those converted; ``staging_bytes`` the largest group.

    Memory: one group of weights that are converted together, and 64 MiB. Disk: the old values of what is in
    memory, and new files beside the old ones.

    Raises:
        WeightsError: weights are missing, unexpected, duplicate, misshapen or not finite.
        SourceError: the source cannot be read, or a disk is full.
        UnsupportedError: the model is quantized by transformers.
        OffloadError: the model has lost values, or there is not enough memory.

    """
    if (weights_path is None) == (weights_iterator is None):
        raise ReloadError("Give weights_path or weights_iterator, and not both. The model is as it was.")
    started = time.perf_counter()
    with contextlib.ExitStack() as stack, held():
        source: Source
        if weights_path is not None:
            source = open_source(weights_path, require_marker=require_marker)
        else:
            assert weights_iterator is not None, "one of the two was given"
            source = _spilled(weights_iterator, spill_dir)
            stack.callback(source.close)
        infos = list(source.infos() or ())
        plan = plan_reload(model, infos, source.description)
        planned = time.perf_counter()
        refuse_if_short(needs_of(_HOST, plan.group_bytes, 0), "Converting the largest group of weights")
        undo = SpillFile(spill_dir, "the old values")
        stack.callback(undo.close)
        stream = source.read(plan.order)
        stack.callback(stream.close)
        files = source.file_of if point_to_files and isinstance(source, SafetensorsSource) else {}
        run = _Run(model, plan, stream, undo, files, check_finite)
        run.all()
        _reloads[model] = _reloads.get(model, 0) + 1
        done = time.perf_counter()
        return _report(model, plan, source, infos, run, weight_version, planned - started, done - started)


def _spilled(weights: Iterable[tuple[str, torch.Tensor]], folder: str | None) -> SpillFile:
    """Everything an iterator gives, in a temporary file.

    Raises:
        SourceError: the disk is full.
        WeightsError: a name came twice, or with something that is no tensor.

    """
    file = SpillFile(folder, "the iterator")
    wrong: dict[str, dict[str, str]] = {"duplicate": {}, "misshapen": {}}
    try:
        with let_through():
            for name, tensor in weights:
                if not isinstance(tensor, torch.Tensor):
                    wrong["misshapen"][name] = f"a {type(tensor).__name__} is no tensor"
                elif name in file:
                    wrong["duplicate"][name] = "it was sent before"
                else:
                    file.add(name, tensor)
        if any(wrong.values()):
            raise weights_error("the iterator", UNCHANGED, **wrong)
    except BaseException:
        file.close()
        raise
    return file


class _Run:
    """One reload: values are written group by group, with the old ones kept, and files are put in use last.

    Args:
        model: the model.
        plan: what is written.
        stream: the source's tensors, in the plan's order.
        undo: takes the old values of what is in memory.
        files: name -> file that an index may be pointed at.
        check_finite: whether to refuse NaN and infinity.

    """

    def __init__(
        self,
        model: nn.Module,
        plan: ReloadPlan,
        stream: Stream,
        undo: SpillFile,
        files: Mapping[str, str],
        check_finite: bool,
    ) -> None:
        self._model = model
        self._plan = plan
        self._stream = stream
        self.undo = undo
        """The old values of what is in memory."""
        self._files = files
        self._check_finite = check_finite
        self._staged: list[StagedWrite] = []
        self._written: dict[Hashable, bytes] = {}
        """Tied names that came both -> the digest of the first."""
        self._devices: set[torch.device] = set()
        self.read_seconds = 0.0

    def all(self) -> None:
        """Write everything; after any failure every value is the old one."""
        committed: list[StagedWrite] = []
        try:
            for group in self._plan.groups:
                deliver()
                with torch.no_grad():
                    made = group.convert(self._model, self._next)
                for name, value in made.items():
                    pointed = self._pointed(group.sources[0][0], value) if group.converter is None else None
                    self._write(name, value, pointed)
                    del value  # its memory is read into again
                del made
            if next(self._stream, None) is not None:
                raise SourceError("The source gave more than it was asked for.")
            for device in self._devices:
                ops_for(device).fence()
            for staged in self._staged:
                committed.append(staged)
                staged.commit()
        except BaseException as error:
            self._roll_back(committed, error)
            raise
        finally:
            for staged in self._staged:
                staged.close()

    def _next(self, info: TensorInfo) -> torch.Tensor:
        started = time.perf_counter()
        name, tensor = next(self._stream)
        self.read_seconds += time.perf_counter() - started
        assert name == info.name, "sources keep to the order"
        return tensor

    def _pointed(self, info: TensorInfo, value: torch.Tensor) -> tuple[str, str] | None:
        """File and name of a value that the source's file holds as it is."""
        file = self._files.get(info.name)
        return None if file is None or info.dtype != value.dtype else (file, info.name)

    def _write(self, name: str, value: torch.Tensor, pointed: tuple[str, str] | None) -> None:
        places = self._plan.targets[name]
        if self._check_finite and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise weights_error("the source", UNCHANGED, nonfinite={name: f"{count} values"})
        if len(places) > 1 and self._came_before(places, name, value):
            return
        done: set[Hashable] = set()
        for place in places:
            stored = place.stored
            assert stored is not None, "lost values were refused"
            if stored.key in done:
                continue
            done.add(stored.key)
            if isinstance(stored, InMemory):
                self.undo.add(place.name, stored.read())
                self._devices.add(stored.device)
                place.write(value)
            elif pointed is not None:
                self._staged.append(pointed_at(stored, *pointed, value.dtype))
            else:
                self._staged.append(stored.stage(value.to(place.shown.dtype)))

    def _came_before(self, places: Sequence[Placement], name: str, value: torch.Tensor) -> bool:
        """Whether a tied weight came under another name, and is written.

        Raises:
            DuplicateWeightsError: it came with other values.

        """
        first, digest = places[0].name, digest_of(value)
        if first not in self._written:
            self._written[first] = digest
            return False
        if self._written[first] != digest:
            others = ", ".join(place.name for place in places if place.name != name)
            raise weights_error(
                "the source", UNCHANGED, duplicate={name: f"it is one weight with {others}, which differs"}
            )
        return True

    def _roll_back(self, committed: list[StagedWrite], error: BaseException) -> None:
        by_name = {place.name: place for place in self._plan.places}
        try:
            for staged in reversed(committed):
                staged.undo()
            for name, value in self.undo.read():
                by_name[name].stored.write(value)  # type: ignore[union-attr]
            for device in self._devices:
                ops_for(device).fence()
        except (ReloadError, OSError, RuntimeError) as failure:
            raise OffloadError(
                f"The reload failed ({error}), and the old values could not be brought back ({failure}). The "
                "model holds a mixture. Reload it from a complete checkpoint."
            ) from error


def _report(
    model: nn.Module,
    plan: ReloadPlan,
    source: Source,
    infos: list[TensorInfo],
    run: _Run,
    weight_version: str | None,
    plan_seconds: float,
    seconds: float,
) -> ReloadReport:
    used = [info for group in plan.groups for info, _ in group.sources]
    renamed = sum(len(group.sources) for group in plan.groups if group.converter is None)
    return ReloadReport(
        source=source.description,
        policy="streaming",
        old_generation="spill",
        tensors=len(infos),
        nbytes=sum(info.nbytes for info in infos),
        replayed=renamed,
        computed=len(used) - renamed,
        layers=len(plan.groups),
        kept=dict(plan.kept),
        ignored=dict(plan.ignored),
        staging_bytes=plan.group_bytes,
        seconds={"plan": plan_seconds, "read": run.read_seconds, "total": seconds},
        version=_reloads[model],
        weight_version=weight_version,
        spilled_bytes=run.undo.nbytes + (0 if isinstance(source, FileSource) else source.nbytes),  # type: ignore[attr-defined]
    )
