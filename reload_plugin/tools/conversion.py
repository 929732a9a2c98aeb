"""Converts any checkpoint to safetensors: streamed, all or nothing, with a record of its origin."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..checkpoint import FileSource, open_source
from ..checkpoint.formats.safetensors_files import read_header
from ..checkpoint.io.atomic import carry_over, written_atomically
from ..checkpoint.io.writing import FilePlan, index_of, plan_files, write_file
from ..checkpoint.sidecar import KEY, WRITTEN, file_digest, origin_of_files, why_stale
from ..errors import SourceError
from .foreign_files import foreign_files, refuse_collisions
from .nested import NestedFile, Structure, unflatten

STRUCTURE = "reload_plugin.structure"
"""Key of the structure of a nested state dict in a file's ``__metadata__``."""
FILE_BYTES = 5_000_000_000
"""Largest file, as Hugging Face's ``save_pretrained`` has it."""
TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_WEIGHTS = (*TORCH_FILES, ".safetensors", ".distcp", ".metadata", ".gguf", ".h5", ".msgpack", ".npz", ".onnx")
_INDEX = ".index.json"
INDEX_NAME = f"model.safetensors{_INDEX}"
_SMALL = 256 << 20
"""Bytes; larger files beside the weights are taken for weights."""

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes there are."""


class ConvertReport(BaseModel):
    """What ``convert`` did."""

    model_config = ConfigDict(frozen=True)

    source: str
    target: str
    format: str
    """Format of the source."""
    nested: bool
    """Whether a nested state dict was kept, with its structure in the metadata."""
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    """Names of the safetensors files."""
    copied: tuple[str, ...]
    """Names of the files beside the weights that were copied (config, tokenizer)."""
    seconds: float


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    overwrite: bool = False,
    replace_converted: bool = False,
    weights_only: bool = False,
    max_file_bytes: int = FILE_BYTES,
    config: str | Path | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write a checkpoint as safetensors. Peak memory: its largest tensor and 64 MiB.

    A single torch file is kept whole: a nested state dict, optimizer state and numbers included, with its
    structure as JSON in the metadata; ``read_nested`` gives it back. Of anything else the weights are taken.

    Args:
        src: what ``open_source`` reads, or a torch file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``).
        dst: a folder to make; or a file whose name ends in ``.safetensors``, which holds everything.
        overwrite: replace what is at ``dst``, whatever it is: of a folder, all that is in it.
        replace_converted: replace what an earlier conversion wrote at ``dst``; other files there stay.
            A file that the conversion would make, and that is not as an earlier one wrote it, is an error.
        weights_only: of a torch file too, take only the weights, under the names ``open_source`` gives them.
        max_file_bytes: largest file in a folder; more become several files with an index.
        config: folder with config.json and tokenizer, copied into the folder beside the weights; by default
            ``src``, if they are there.
        progress: called as bytes are written.

    Raises:
        SourceError: the source cannot be read or changed meanwhile, ``dst`` exists, or writing failed.
            Nothing is left at ``dst`` then; what was there before is untouched.

    """
    src, dst = Path(src), Path(dst)
    started = time.perf_counter()
    if dst.exists() and src.exists() and dst.samefile(src):
        raise SourceError(f"{dst} is the source itself. Choose another place.")
    if max_file_bytes <= 0:
        raise SourceError(
            f"max_file_bytes is {max_file_bytes} and has to be positive. Give a number of bytes."
        )
    content = _open(src, weights_only)
    single = dst.suffix == ".safetensors"
    plans = plan_files(content.source.infos(), None if single else max_file_bytes)
    beside = [] if single else _companions(src, None if config is None else Path(config))
    update = replace_converted and not overwrite and dst.is_dir() and any(dst.iterdir())
    foreign = foreign_files(dst) if update else []
    refuse_collisions(foreign, _made(plans), beside)
    try:
        with written_atomically(dst, overwrite or replace_converted) as partial:
            writing = _Writing(content, plans, progress)
            if single:
                writing.file(partial, plans[0], first=True)
            else:
                partial.mkdir()
                writing.folder(partial, beside)
            if not content.source.unchanged():
                raise SourceError(
                    f"{src} changed while it was read. Convert it when the trainer has finished writing."
                )
            carry_over(foreign, partial)
    except OSError as error:
        raise SourceError(_failed(dst, error)) from error
    return ConvertReport(
        source=str(src),
        target=str(dst),
        format=content.source.format,
        nested=content.structure is not None,
        tensors=sum(len(plan.infos) for plan in plans),
        nbytes=sum(plan.nbytes for plan in plans),
        files=tuple(dst.name if single else plan.name for plan in plans),
        copied=tuple(file.name for file in beside),
        seconds=time.perf_counter() - started,
    )


def read_nested(path: str | Path) -> Any:
    """The nested state dict that ``convert`` kept in a file or folder: what ``torch.load`` would have given.

    Tensors are in memory of their own.

    Raises:
        SourceError: it cannot be read, or holds no nested state dict.

    """
    path = Path(path)
    structure = _structure_of(path)
    if structure is None:
        raise SourceError(f"{path} holds no nested state dict. open_source reads its tensors by name.")
    return unflatten(dict(open_source(path).read()), structure)


def is_stale(converted: str | Path, original: str | Path | None = None) -> bool:
    """Whether the original changed since ``convert`` read it: by size, times and, in doubt, digest.

    Args:
        converted: file or folder that ``convert`` wrote.
        original: where the original is now; by default where it was. One that is gone makes nothing stale.

    Raises:
        SourceError: ``converted`` cannot be read, or does not say what it was made from.

    """
    return why_stale(converted, original) is not None


def _structure_of(path: Path) -> Structure | None:
    """What ``convert`` wrote of a nested state dict into the first file, if this is one."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or files[0].suffix != ".safetensors":
        return None
    text = read_header(str(files[0])).metadata.get(STRUCTURE)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"The structure in {path} is damaged: {error}. Convert the original again."
        ) from error
    if not isinstance(found, dict):
        raise SourceError(f"The structure in {path} is damaged. Convert the original again.")
    return found


def _failed(dst: Path, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "No space is left" if full else f"Writing failed ({error})"
    return f"{what} at {dst.parent}. Nothing was left there. Choose a place with room that can be written."


# -- what is converted ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """A checkpoint, and the structure of the nested state dict it is, if it is one."""

    src: Path
    source: FileSource
    structure: Structure | None


def _open(src: Path, weights_only: bool) -> _Content:
    if src.is_file() and src.suffix in TORCH_FILES and not weights_only:
        nested = NestedFile(src)
        return _Content(src, nested, nested.structure)
    return _Content(src, open_source(src), _structure_of(src))


# -- what is written ------------------------------------------------------------------------------


class _Writing:
    """One conversion under way."""

    def __init__(self, content: _Content, plans: Sequence[FilePlan], progress: Progress | None) -> None:
        self._content = content
        self._plans = plans
        self._progress = progress
        self._total = sum(plan.nbytes for plan in plans)
        self._done = 0

    def folder(self, folder: Path, beside: Sequence[Path]) -> None:
        # Copies first: the first file of weights notes their digests.
        written: dict[str, str | None] = dict.fromkeys(_made(self._plans))
        for file in beside:
            written[file.name] = _copy(file, folder / file.name)
        if len(self._plans) > 1:
            _write_text(folder / INDEX_NAME, index_of(self._plans, {}))
        for plan in self._plans:
            self.file(folder / plan.name, plan, first=plan is self._plans[0], written=written)

    def file(
        self, path: Path, plan: FilePlan, first: bool, written: Mapping[str, str | None] | None = None
    ) -> None:
        """Write one file. The first one tells where all of it came from, how it was nested, and what else was
        written into its folder.
        """
        metadata = {"format": "pt"} | (self._notes() if first else {})
        if first and written is not None:
            metadata[WRITTEN] = json.dumps(written)
        order = [info.name for info in plan.infos]
        with contextlib.closing(self._content.source.read(order)) as tensors:
            write_file(path, plan, metadata, tensors, self._wrote)

    def _notes(self) -> dict[str, str]:
        origin = origin_of_files(self._content.src, map(Path, self._content.source.files))
        notes = {KEY: origin.model_dump_json()}
        if self._content.structure is not None:
            notes[STRUCTURE] = json.dumps(self._content.structure)
        return notes

    def _wrote(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> str:
    """Copy a file and have it on disk; returns the SHA-256 of the copy."""
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())
    return file_digest(target)


def _made(plans: Sequence[FilePlan]) -> list[str]:
    """Names of the weight files of a folder, and of their index."""
    return [plan.name for plan in plans] + ([INDEX_NAME] if len(plans) > 1 else [])


def _companions(src: Path, config: Path | None) -> list[Path]:
    """Files beside the weights that an engine needs to start: config, tokenizer, code. Top level only."""
    folder = config or _config_folder(src)
    if folder is None:
        return []
    if not folder.is_dir():
        raise SourceError(
            f"There is no folder {folder} to take config.json and the tokenizer from. Give another."
        )
    return sorted(file for file in folder.iterdir() if file.is_file() and _goes_along(file))


def _config_folder(src: Path) -> Path | None:
    """Where the model's config.json is: with the weights, or where verl puts it."""
    folder = src if src.is_dir() else src.parent
    places = (folder, folder / "huggingface")
    return next((place for place in places if (place / "config.json").is_file()), None)


def _goes_along(file: Path) -> bool:
    weights = file.suffix in _WEIGHTS or file.name.endswith(_INDEX)
    return not weights and not file.name.startswith(".") and file.stat().st_size <= _SMALL
