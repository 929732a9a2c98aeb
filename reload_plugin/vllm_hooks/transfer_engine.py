"""A weight-transfer engine that reads files: chunked updates of a serving engine without a GPU.

vLLM's own engines move tensors between processes over NCCL or CUDA IPC. This one is told where a
safetensors checkpoint lies and which of its tensors to load now; start, load and finish go through
the same layerwise calls as theirs.

Streams: vLLM's engines call ``model.load_weights`` with the stream that they receive on as the current one,
and may use another one for the next chunk. See ``transaction.session.ReloadSession`` for what is waited for.

    vllm serve ... --weight-transfer-config '{"backend": "files"}'
    llm.update_weights({"update_info": {"path": "/checkpoints/step-12", "names": [...]}})
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import vllm_api
from ..checkpoint import Source, open_folder
from ..device.ops import ops_for
from ..errors import SERVES_OLD, SHOWN, SessionError, SourceError
from ..record.model_record import record_of
from ..transaction.engine_state import state_of

BACKEND = "files"
"""What ``weight_transfer_config`` calls this engine."""

ENGINE = "FilesTransferEngine"
"""Name under which vLLM's factory looks the class up in this module, when an engine is created."""

UPDATE_ENDED = f"The weight update has ended and nothing of it is served. {SERVES_OLD}"
KEYS = '{"path": folder or file, "names": [...]}, where names may be left out'


@dataclass(frozen=True)
class InitInfo:
    """Nothing: files need no connection, so ``init_weight_transfer_engine`` need not be called."""


@dataclass(frozen=True)
class UpdateInfo:
    """One chunk of a weight update.

    Attributes:
        path: folder or safetensors file, as every worker sees it.
        names: the tensors of it to load, in this order; None for all.

    """

    path: str
    names: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, update_info: object) -> UpdateInfo:
        """Raises SourceError when ``update_info`` is not ``{"path": str, "names": list of str}``."""
        if not isinstance(update_info, dict):
            raise SourceError(f"update_info is {type(update_info).__name__}; it has to be {KEYS}.")
        if unknown := sorted(str(key) for key in update_info.keys() - {"path", "names"}):
            raise SourceError(f"update_info has unknown keys: {', '.join(unknown)}. It has to be {KEYS}.")
        path, names = update_info.get("path"), update_info.get("names")
        if not isinstance(path, str) or not path:
            raise SourceError(f"update_info has no path, or one that is not text. It has to be {KEYS}.")
        if names is None:
            return cls(path)
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise SourceError(f"names in update_info is not a list of text. It has to be {KEYS}.")
        return cls(path, tuple(names))


class FilesTransfer:
    """What the engine does; ``engine_class`` adds vLLM's base class.

    A chunk that fails ends the update: vLLM's worker then counts it as ended too, and takes a new
    start. A finish that fails leaves the update open: send what is missing and finish again.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    # Set by vLLM's base class; another model while a draft model is updated.
    model: nn.Module
    model_config: Any
    vllm_config: Any

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """There is nothing to connect to."""

    def shutdown(self) -> None:
        """There is nothing to release."""

    def start_weight_update(self) -> None:
        """Open an update. The engine goes on serving the old weights until ``finish_weight_update``."""
        vllm_api.initialize_layerwise(self.model)

    def finish_weight_update(self) -> None:
        """Check that everything came, process and commit.

        Raises:
            WeightsError: lists all that does not fit; the old weights are served.

        """
        vllm_api.finalize_layerwise(self.model, self.model_config)

    def parse_update_info(self, update_dict: object) -> UpdateInfo:
        """See ``UpdateInfo.parse``. What is wrong ends the update."""
        with self._ending_on_failure():
            return UpdateInfo.parse(update_dict)

    def update_weights(self, update_info: object) -> None:
        """Load one chunk into the open update.

        Raises:
            SourceError: ``update_info`` is not what it has to be, or what it names is not there.
            SessionError: no update is open.
            ReloadError: anything else. In all cases the update has ended and the old weights are served.

        """
        self.receive_weights(self.parse_update_info(update_info))
        with self._ending_on_failure():
            ops_for(_device_of(self.model)).fence()  # the weights may be copied on another stream

    def receive_weights(
        self, update_info: UpdateInfo, load_weights: Callable[[Any], object] | None = None
    ) -> None:
        """Load the named tensors through ``model.load_weights``, which the open update has taken over.

        ``load_weights``: what takes its place, where the caller has one.
        """
        with self._ending_on_failure():
            # Without an open update load_weights would write into the weights that are served.
            if record_of(self.model) is not None and state_of(self.model).update is None:
                raise SessionError(f"No weight update is open: none was started, or it failed. {SERVES_OLD}")
            record = record_of(self.model)  # engines of older versions are not told the configs
            vllm_config = getattr(self, "vllm_config", getattr(record, "vllm_config", None))
            model_config = getattr(self, "model_config", getattr(record, "model_config", None))
            source = open_folder(update_info.path, vllm_config, model_config, self.model)
            order = _order(source, update_info.names)
            load: Any = load_weights or self.model.load_weights
            with contextlib.closing(source.read(order)) as weights:
                load(weights)

    @contextlib.contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """Whatever is raised ends the update; older versions of vLLM call parts of ``update_weights``."""
        try:
            yield
        except BaseException as error:
            if record_of(self.model) is not None:
                state_of(self.model).abandon_update()
            if isinstance(error, SourceError):
                raise SourceError(f"{error} {UPDATE_ENDED}") from error
            raise


def _order(source: Source, names: Sequence[str] | None) -> Sequence[str] | None:
    """The names to read; raises SourceError when some are not in the checkpoint."""
    if names is None:
        return None
    infos = source.infos()
    if infos is None:
        raise SourceError(f"{source.description} cannot be listed, so names cannot be picked from it.")
    if absent := sorted(set(names) - {info.name for info in infos}):
        more = f", and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        raise SourceError(f"{source.description} does not hold {', '.join(absent[:SHOWN])}{more}.")
    return names


def _device_of(model: nn.Module) -> torch.device:
    """The device that serves the model."""
    if (record := record_of(model)) is not None:
        return record.target_device
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@functools.cache
def engine_class() -> type:
    """``FilesTransfer`` as a subclass of vLLM's ``WeightTransferEngine``, for its factory."""
    return vllm_api.transfer_engine(ENGINE, FilesTransfer)


def __getattr__(name: str) -> Any:
    if name == ENGINE:
        return engine_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def offer() -> str | None:
    """Register the engine with vLLM's factory; returns why not, if it could not be."""
    return vllm_api.register_transfer_engine(BACKEND, __name__, ENGINE)


def withdraw() -> None:
    """Take the engine out of vLLM's factory again."""
    vllm_api.unregister_transfer_engine(BACKEND)
