"""What can go wrong with a reload, as exceptions.

::

    ReloadError                    the root; every message says what the engine serves now
    ├── UnsupportedError           this vLLM, model or parameter cannot be reloaded by us
    ├── NotRecordedError           the model's load format was never recorded
    ├── SourceError                the weights could not be read (path, file, iterator)
    ├── WeightsError               the weights do not fit the model; lists every offender
    │   ├── MissingWeightsError
    │   ├── UnexpectedWeightsError
    │   ├── DuplicateWeightsError
    │   ├── MisshapenWeightsError  wrong shape, a cast that would lose everything, not a tensor
    │   └── NonFiniteWeightsError  NaN or infinite values, where the caller asked for a check
    ├── PartialUpdateError         the weights that were not sent cannot be kept; lists what to send
    │   └── CrossGroupEffectError  processing the layers sent changes others as well
    ├── LateLoaderError            the model's loader used a layer again after it was complete
    │   ├── LateReadError          it read loaded values, which were processed already
    │   └── LateWriteError         it wrote there, or to a served tensor
    ├── ProcessingError            process_weights_after_loading raised on the new weights
    ├── KernelFormatError          weights in kernel format that do not match it exactly
    ├── OffloadError               weights that live elsewhere could not be brought, taken back or written
    ├── RanksDisagreeError         another rank failed or did not answer, so no rank committed
    ├── WorkerDiedError            a worker process of the engine died, and the engine with it
    ├── ExportError                weights could not be written out; lists every tensor concerned
    └── SessionError               a call that the state of the reload does not allow
        └── EngineBrokenError      the engine holds a mixture and refuses to serve until healed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 8
"""Offenders listed in a message; the attributes hold all of them."""


SERVES_OLD = "The engine serves what it served before."
"""Ends a message after a failure that left the served weights unchanged."""


class ReloadError(RuntimeError):
    """A reload failed. Unless the error says otherwise the engine serves what it served before."""


class UnsupportedError(ReloadError):
    """The installed vLLM, or a part of this model, cannot be reloaded correctly by this package."""


class NotRecordedError(ReloadError):
    """The model was built before the plugin was registered, so its load format is unknown."""


class SourceError(ReloadError):
    """The weights could not be read. The original exception, if any, is the ``__cause__``."""


class LateLoaderError(ReloadError):
    """The model's loader used a layer again after it was complete; ``whole_model=True`` allows that."""


class LateWriteError(LateLoaderError):
    """The loader wrote to a complete layer or to a served tensor."""


class LateReadError(LateLoaderError):
    """The loader read loaded values of a complete layer. The next reload processes that layer at the end."""


class ProcessingError(ReloadError):
    """vLLM's ``process_weights_after_loading`` raised. The original is the ``__cause__``."""


class KernelFormatError(ReloadError):
    """Weights sent in kernel format do not match the served tensors exactly."""


class RanksDisagreeError(ReloadError):
    """Another rank failed or did not answer in time, so no rank committed.

    Attributes:
        reasons: rank -> its error, or that it did not answer.

    """

    def __init__(self, message: str, reasons: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.reasons)


class WorkerDiedError(ReloadError):
    """A worker process of the engine died. vLLM ends the others then: the engine has to be started again.

    Attributes:
        ranks: rank -> how it ended.

    """

    def __init__(self, message: str, ranks: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.ranks = dict(ranks or {})

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.ranks)


class OffloadError(ReloadError):
    """Weights that live elsewhere could not be brought, taken back or written; it says what the model is."""


class SessionError(ReloadError):
    """A call that the state of the reload session does not allow."""


class EngineBrokenError(SessionError):
    """The engine holds a mixture of two generations and does not serve. A good reload heals it."""


class ExportError(ReloadError):
    """Weights could not be written out. Nothing was written: what was at the target before is still there.

    Attributes:
        tensors: name -> why it cannot be written; empty where no single tensor is the reason.

    """

    def __init__(self, message: str, tensors: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.tensors = dict(tensors or {})

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.tensors)


class WeightsError(ReloadError):
    """The weights do not fit the model. Nothing was committed.

    Attributes:
        missing: parameter (or part of one) -> why it counts as missing.
        unexpected: checkpoint name -> the reason of the model's loader.
        duplicate: checkpoint name -> that it was sent more than once.
        misshapen: checkpoint name -> expected and received shape or dtype.
        nonfinite: checkpoint name -> how many values are NaN or infinite.

    """

    def __init__(
        self,
        message: str,
        missing: Mapping[str, str] | None = None,
        unexpected: Mapping[str, str] | None = None,
        duplicate: Mapping[str, str] | None = None,
        misshapen: Mapping[str, str] | None = None,
        nonfinite: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing = dict(missing or {})
        self.unexpected = dict(unexpected or {})
        self.duplicate = dict(duplicate or {})
        self.misshapen = dict(misshapen or {})
        self.nonfinite = dict(nonfinite or {})

    def __reduce__(self) -> tuple[object, ...]:
        kinds = (self.missing, self.unexpected, self.duplicate, self.misshapen, self.nonfinite)
        return type(self), (str(self), *kinds)


class MissingWeightsError(WeightsError):
    """Parameters, or parts of them, that no weight was sent for."""


class UnexpectedWeightsError(WeightsError):
    """Weights that the model does not use."""


class DuplicateWeightsError(WeightsError):
    """Weights that were sent more than once under the same name."""


class MisshapenWeightsError(WeightsError):
    """Weights whose shape or dtype does not fit their parameter."""


class NonFiniteWeightsError(WeightsError):
    """Weights with NaN or infinite values, where ``check_finite`` was asked for."""


class PartialUpdateError(ReloadError):
    """A partial update would lose weights that were not sent. Nothing was changed.

    Attributes:
        companions: checkpoint names to send as well, in the order of the layers.

    """

    def __init__(self, message: str, companions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.companions = tuple(companions)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.companions)


class CrossGroupEffectError(PartialUpdateError):
    """Processing the layers of a partial update changed other layers, which were restored."""


_KINDS: dict[str, type[WeightsError]] = {
    "missing": MissingWeightsError,
    "unexpected": UnexpectedWeightsError,
    "duplicate": DuplicateWeightsError,
    "misshapen": MisshapenWeightsError,
    "nonfinite": NonFiniteWeightsError,
}


def weights_error(source: str, consequence: str, **offenders: Mapping[str, str]) -> WeightsError:
    """One error for all offenders: the precise class when they are of one kind, else WeightsError.

    ``offenders`` are mappings of name -> reason by kind (``missing=``, ``unexpected=``, ``duplicate=``,
    ``misshapen=``, ``nonfinite=``); empty ones are left out of the text.
    """
    present = {kind: found for kind, found in offenders.items() if found}
    lines = [f"The weights from {source} do not fit the model."]
    lines += [_list(kind, found) for kind, found in present.items()]
    lines.append(consequence)
    cls = _KINDS[next(iter(present))] if len(present) == 1 else WeightsError
    return cls("\n".join(lines), **present)


def export_error(what: str, next_step: str, tensors: Mapping[str, str]) -> ExportError:
    """One error for all tensors that cannot be written.

    Args:
        what: a clause that the list follows ("cannot be written under the names of a checkpoint").
        next_step: sentences that end the message.
        tensors: name -> why.

    """
    noun = "tensor" if len(tensors) == 1 else "tensors"
    return ExportError(f"{_list(f'{noun} {what}', tensors, 'tensors').strip()}\n{next_step}", tensors)


def describe_ranks(texts: Mapping[int, str]) -> str:
    """One line a text that ranks have in common: ``ranks 0, 2: no such folder``."""
    by_text: dict[str, list[int]] = {}
    for rank in sorted(texts):
        by_text.setdefault(texts[rank], []).append(rank)
    lines = []
    for text, ranks in by_text.items():
        noun = "rank" if len(ranks) == 1 else "ranks"
        lines.append(f"{noun} {', '.join(map(str, ranks))}: {text}")
    return "\n".join(lines)


def _list(kind: str, found: Mapping[str, str], attribute: str | None = None) -> str:
    names = sorted(found)
    shown = [f"{name} ({found[name]})" if found[name] else name for name in names[:SHOWN]]
    more = f", and {len(names) - SHOWN} more (see .{attribute or kind})" if len(names) > SHOWN else ""
    return f"  {len(names)} {kind}: {', '.join(shown)}{more}."
