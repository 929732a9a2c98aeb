"""Format detection: the one place that knows every format, by file names and first bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..errors import SHOWN, SourceError
from .file_source import FileSource
from .formats.dcp_files import METADATA, SHARD_FILE, DcpSource, ShardedSafetensorsSource
from .formats.fsdp_files import RANK_FILE, FsdpSource
from .formats.olmo_files import OlmoSource, is_olmo
from .formats.refused import refuse_adapter, refuse_deepspeed, refuse_gguf, refuse_megatron, refuse_text
from .formats.safetensors_files import SafetensorsSource
from .formats.safetensors_index import TWO_SAVES, check_index, read_index
from .formats.torch_files import is_torch_file
from .formats.torch_source import TorchSource
from .io.json_files import open_regular
from .sidecar import refuse_stale

NEXT = "Give a folder of safetensors files (model.safetensors, or files with an index)."
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.[a-z]+")
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_BESIDE = re.compile(
    r"(optim|sched|scaler|rng|random|train|extra_state|data|args|common|tokenizer|generation|ema_only)",
    re.IGNORECASE,
)
"""Files of torch.save that trainers write beside the weights."""
_INSIDE = re.compile(r"(pytorch_model_fsdp_\d+|actor|policy|model|weights|checkpoint)")
"""Folders in which frameworks put the weights, one below the one they name."""


def open_source(
    path: str | Path, *, require_marker: str | None = None, within: str | None = None
) -> FileSource:
    """Open the checkpoint at ``path`` in any format; works without an engine.

    Knows safetensors, files of torch.save, rank files of FSDP, torch.distributed.checkpoint and OLMo's files.
    Runs nothing that a file contains. Reads names, shapes and dtypes now, and weights when iterated.

    Args:
        path: a file or a folder.
        require_marker: name of a file that the trainer writes last; without it the folder is refused.
        within: dotted path of the state dict to take where a file holds several (``model``, ``ema.shadow``).

    Returns:
        ``names()`` and iteration are in the order of the layers; ``infos()`` and ``read()`` too.

    Raises:
        SourceError: nothing is there, it is incomplete, or of another format; the message says what to do.

    """
    place = Path(path)
    if require_marker is not None:
        check_marker(place, require_marker)
    try:
        if place.is_dir():
            found = _of_folder(place, within)
        elif place.exists():
            found = _of_file(place, within)
        else:
            raise SourceError(f"There is no file or folder {path}. {NEXT}")
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}. {NEXT}") from error
    found.sort_by_layer()
    return found


def check_marker(place: Path, marker: str) -> None:
    """Raise SourceError unless the file that ends a save is there."""
    if not marker or "/" in marker or marker in (".", ".."):
        raise SourceError(
            f"require_marker is the name of a file, and {marker!r} is none. Give one without a folder."
        )
    folder = place if place.is_dir() else place.parent
    if not (folder / marker).exists():
        raise SourceError(
            f"{folder} has no file {marker}, so its save has not ended. Reload when the trainer has written "
            "it, or without require_marker."
        )


def plain_safetensors(
    files: Sequence[str],
    description: str,
    within: str | None = None,
    opened: Callable[[Sequence[str], str], SafetensorsSource] = SafetensorsSource,
) -> FileSource:
    """Safetensors files, read as OLMo's where their names say so; ``opened`` makes the source of others."""
    source = opened(files, description)
    refuse_stale(source.metadata)
    if is_olmo(source.stored_names):
        return OlmoSource(SafetensorsSource(files, description), within)
    return source


def is_plain(name: str) -> bool:
    """Whether this is a safetensors file of a model, and no adapter and no shard of one."""
    adapter = name.startswith("adapter_model.")
    return name.endswith(".safetensors") and not adapter and not SHARD_FILE.fullmatch(name)


def check_numbers(folder: Path, names: Collection[str]) -> None:
    """Refuse files numbered ``-00001-of-00003`` of which some are missing."""
    by_set: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            by_set.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in by_set.items():
        missing = sorted(set(range(1, min(count, 100_000) + 1)) - numbers) if 0 not in numbers else ()
        if missing:
            raise SourceError(f"{folder} lacks file {missing[0]} of the {count} of {stem}. {TWO_SAVES}")


# -- a file ---------------------------------------------------------------------------------------


def _of_file(file: Path, within: str | None) -> FileSource:
    if RANK_FILE.fullmatch(file.name) or SHARD_FILE.fullmatch(file.name) or file.suffix == ".distcp":
        raise SourceError(f"{file} is one rank's part of a checkpoint. Give the folder {file.parent}.")
    if file.name == METADATA:
        raise SourceError(f"{file} lists a checkpoint. Give the folder {file.parent}.")
    refuse_adapter(file, [file.name])
    refuse_deepspeed(file, [file.name])
    if file.suffix == ".gguf" or _begins(file, b"GGUF"):
        refuse_gguf([str(file)])
    if file.suffix == ".json":
        raise SourceError(f"{file} is no file of weights. Give the folder {file.parent}.")
    refuse_text(file)
    if is_torch_file(file) and file.suffix != ".safetensors":
        return TorchSource([str(file)], str(file), within)
    if file.suffix == ".safetensors" or _begins(file, b"{", 8):
        return plain_safetensors([str(file)], str(file), within)
    raise SourceError(f"{file} is no checkpoint: neither safetensors nor a file of torch.save. {NEXT}")


def _begins(file: Path, with_: bytes, at: int = 0) -> bool:
    with open_regular(file) as handle:
        handle.seek(at)
        return handle.read(len(with_)) == with_


# -- a folder -------------------------------------------------------------------------------------


def _of_folder(folder: Path, within: str | None) -> FileSource:
    present = {file.name for file in folder.iterdir()}
    plain = sorted(name for name in present if is_plain(name))
    if plain:
        return _safetensors(folder, plain, present, within)
    if any(SHARD_FILE.fullmatch(name) for name in present):
        return ShardedSafetensorsSource(str(folder))
    index = read_index(folder, "model.safetensors.index.json", present)
    if index is not None:
        raise SourceError(f"{index[0]} names no files. {TWO_SAVES}")
    return other_than_safetensors(folder, within)


def other_than_safetensors(folder: Path, within: str | None = None) -> FileSource:
    """The checkpoint in a folder without safetensors files.

    Raises:
        SourceError: as ``open_source``.

    """
    present = {file.name for file in folder.iterdir()}
    if any(RANK_FILE.fullmatch(name) for name in present):
        return FsdpSource(str(folder), within)
    refuse_megatron(folder, present)
    if METADATA in present or any(name.endswith(".distcp") for name in present):
        return DcpSource(str(folder), within)
    refuse_deepspeed(folder, present)
    files = _torch_files(folder, present)
    if files:
        return TorchSource(files, str(folder), within)
    return _one_below(folder, present, within)


def _safetensors(folder: Path, plain: list[str], present: set[str], within: str | None) -> FileSource:
    index = read_index(folder, "model.safetensors.index.json", present)
    if index is None:
        check_numbers(folder, plain)
        return plain_safetensors([str(folder / name) for name in plain], str(folder), within)
    files = sorted({str(folder / name) for name in index[1].values()})
    source = SafetensorsSource(files, str(folder))
    refuse_stale(source.metadata)
    check_index(*index, source.file_of, [Path(file).name for file in files])
    return OlmoSource(source, within) if is_olmo(source.stored_names) else source


def _torch_files(folder: Path, present: set[str]) -> list[str]:
    """The files of torch.save that are one checkpoint, if there are any."""
    index = read_index(folder, "pytorch_model.bin.index.json", present)
    if index is not None:
        return sorted({str(folder / name) for name in index[1].values()})
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "pytorch_model_fsdp.bin"):
        if name in present:
            return [str(folder / name)]
    found = [n for n in present if n.endswith(_TORCH_SUFFIXES) and not _BESIDE.match(n)]
    found = [n for n in found if not n.startswith("adapter_model.") and (folder / n).is_file()]
    sets = {match[1] if (match := _NUMBERED.fullmatch(name)) else name for name in found}
    if len(sets) > 1:
        raise SourceError(
            f"{folder} holds several files of weights: {_some(sorted(found))}. Give the one to load."
        )
    check_numbers(folder, found)
    return [str(folder / name) for name in sorted(found)]


def _one_below(folder: Path, present: set[str], within: str | None) -> FileSource:
    """Frameworks put the weights one folder below the one that they name."""
    below = sorted(name for name in present if (folder / name).is_dir())
    held = [name for name in below if not name.startswith("optim") and _holds_weights(folder / name)]
    known = [name for name in held if _INSIDE.fullmatch(name)]
    if len(known) == 1:
        return _of_folder(folder / known[0], within)
    if held:
        raise SourceError(f"{folder} holds no weights, and its folders {_some(held)} do. Give one of them.")
    refuse_adapter(folder, present)
    refuse_gguf([str(folder / name) for name in present if name.endswith(".gguf")])
    for name in sorted(present):
        if name.endswith((".txt", ".b64", ".base64")):
            refuse_text(folder / name)
    what = f"only {_some(sorted(present))}" if present else "nothing"
    raise SourceError(f"{folder} holds no weights: {what}. {NEXT}")


def _holds_weights(folder: Path) -> bool:
    names = [file.name for file in folder.iterdir()]
    return METADATA in names or any(
        RANK_FILE.fullmatch(name) or name.endswith((".safetensors", ".distcp")) for name in names
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
