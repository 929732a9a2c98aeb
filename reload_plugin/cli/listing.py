"""``inspect`` and ``diff``: what is in a checkpoint, and what is different in another."""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Source, TensorInfo, open_source
from ..checkpoint.formats.safetensors_files import read_header
from ..checkpoint.sidecar import origin_of
from ..errors import SourceError
from .show import FINE, NO, as_json, human, progress, table

SHOWN = 20
"""Rows of a table that a person reads; JSON has all."""
_PIECE = 16 << 20
"""Elements that are compared at once."""
_LAYER = re.compile(r"^(.*?(?:^|\.)\d+)(?:\.|$)")
_OUTSIDE = "(outside of layers)"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def listing(path: Path, with_tensors: bool) -> dict[str, Any]:
    """What is in a checkpoint, from its headers, ready for JSON.

    Raises:
        SourceError: it cannot be read, or not be listed.

    """
    source = open_source(path)
    infos = _infos(source)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    layers: dict[str, Counter[str]] = defaultdict(Counter)
    for info in infos:
        nbytes = info.meta().nbytes
        kinds[_dtype(info)].update(tensors=1, bytes=nbytes)
        layers[layer_of(info.name)].update(tensors=1, bytes=nbytes)
    found: dict[str, Any] = {
        "path": str(path),
        "format": source.format,
        "tensors": len(infos),
        "bytes": sum(info.meta().nbytes for info in infos),
        "elements": sum(info.meta().numel() for info in infos),
        "layers": sum(name != _OUTSIDE for name in layers),
        "dtypes": {kind: dict(count) for kind, count in kinds.items()},
        "by_layer": {name: dict(count) for name, count in layers.items()},
        "converted_from": _converted_from(path),
    }
    if with_tensors:
        found["by_tensor"] = {i.name: {"dtype": _dtype(i), "shape": list(i.shape)} for i in infos}
    return found


def layer_of(name: str) -> str:
    """The layer a tensor belongs to: its name up to the first number."""
    found = _LAYER.match(name)
    return found[1] if found else _OUTSIDE


def show_listing(found: dict[str, Any], in_json: bool) -> int:
    """``inspect``: print it."""
    if in_json:
        as_json(found)
        return FINE
    print(
        f"{found['path']}: {found['format']}, {found['tensors']:,} tensors, {human(found['bytes'])}, "
        f"{found['elements']:,} elements, {found['layers']:,} layers"
    )
    if found["converted_from"]:
        print(f"converted from {found['converted_from']}")
    kinds = [(kind, f"{c['tensors']:,}", human(c["bytes"])) for kind, c in found["dtypes"].items()]
    table(("dtype", "tensors", "size"), kinds)
    layers = [(name, f"{c['tensors']:,}", human(c["bytes"])) for name, c in found["by_layer"].items()]
    print()
    table(("layer", "tensors", "size"), layers[:SHOWN])
    _more(len(layers), "layers")
    if "by_tensor" in found:
        print()
        table(
            ("tensor", "dtype", "shape"), [(n, t["dtype"], t["shape"]) for n, t in found["by_tensor"].items()]
        )
    return FINE


def _converted_from(path: Path) -> str | None:
    file = next(iter(sorted(path.glob("*.safetensors"))), None) if path.is_dir() else path
    if file is None or file.suffix != ".safetensors" or not read_header(str(file)).metadata:
        return None
    origin = origin_of(file)
    return None if origin is None else origin.path


def _infos(source: Source) -> list[TensorInfo]:
    found = source.infos()
    if found is None:
        raise SourceError(f"{source.description} cannot be listed before it is read. Convert it first.")
    return list(found)


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _more(count: int, what: str) -> None:
    if count > SHOWN:
        print(f"... and {count - SHOWN:,} more {what} (--json shows all)")


# -- diff -----------------------------------------------------------------------------------------


def difference(one: Path, other: Path, headers_only: bool) -> dict[str, Any]:
    """What is different between two checkpoints, ready for JSON. Reads tensor by tensor, both at once.

    Values are compared bit for bit: NaN equals the same NaN, and -0 is not 0.

    Raises:
        SourceError: one of them cannot be read.

    """
    sources = open_source(one), open_source(other)
    old, new = ({info.name: info for info in _infos(source)} for source in sources)
    common = [name for name in old if name in new]
    reshaped = {n: [list(old[n].shape), list(new[n].shape)] for n in common if old[n].shape != new[n].shape}
    retyped = {n: [_dtype(old[n]), _dtype(new[n])] for n in common if old[n].dtype != new[n].dtype}
    alike = [name for name in common if name not in reshaped and name not in retyped]
    counts = {} if headers_only else dict(_changes(sources, alike, {n: old[n].meta().numel() for n in alike}))
    elements = sum(old[name].meta().numel() for name in alike)
    changed = sum(counts.values())
    found: dict[str, Any] = {
        "a": str(one),
        "b": str(other),
        "only_in_a": [name for name in old if name not in new],
        "only_in_b": [name for name in new if name not in old],
        "shapes": reshaped,
        "dtypes": retyped,
        "compared_tensors": 0 if headers_only else len(alike),
        "compared_elements": 0 if headers_only else elements,
        "changed_elements": changed,
        "changed_share": changed / elements if elements and not headers_only else 0.0,
        "changed": {
            name: {"elements": count, "share": count / old[name].meta().numel()}
            for name, count in counts.items()
            if count
        },
    }
    kinds = ("only_in_a", "only_in_b", "shapes", "dtypes", "changed")
    return {"same": not any(found[kind] for kind in kinds)} | found


def _changes(
    sources: tuple[Source, Source], names: list[str], sizes: dict[str, int]
) -> Iterator[tuple[str, int]]:
    """Name -> elements that differ."""
    total, done = sum(sizes.values()), 0
    with contextlib.ExitStack() as stack:
        tick = stack.enter_context(progress("comparing", unit_bytes=False))
        one, other = (stack.enter_context(contextlib.closing(source.read(names))) for source in sources)
        for (name, first), (_, second) in zip(one, other, strict=True):
            yield name, differing(first, second)
            done += sizes[name]
            tick(done, total)
            del first, second


def differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many elements of two tensors of one shape and dtype differ in their bits."""
    width = one.element_size()
    bits = _BITS.get(width, torch.int64)
    flat = [
        tensor.contiguous().reshape(-1).view(bits).reshape(-1, max(1, width // 8)) for tensor in (one, other)
    ]
    count = 0
    for start in range(0, flat[0].shape[0], _PIECE):
        pieces = [tensor[start : start + _PIECE] for tensor in flat]
        count += int((pieces[0] != pieces[1]).any(1).sum())
    return count


def show_difference(found: dict[str, Any], in_json: bool) -> int:
    """``diff``: print it; the exit code says whether there is any."""
    if in_json:
        as_json(found)
    elif found["same"]:
        print(f"{found['a']} and {found['b']} are the same: {found['compared_tensors']:,} tensors compared")
    else:
        _show_rows(found)
    return FINE if found["same"] else NO


def _show_rows(found: dict[str, Any]) -> None:
    rows = [(name, "only in A") for name in found["only_in_a"]]
    rows += [(name, "only in B") for name in found["only_in_b"]]
    rows += [(name, f"shape {a} -> {b}") for name, (a, b) in found["shapes"].items()]
    rows += [(name, f"dtype {a} -> {b}") for name, (a, b) in found["dtypes"].items()]
    changed = sorted(found["changed"].items(), key=lambda item: -item[1]["share"])
    rows += [(name, f"{c['elements']:,} elements changed ({c['share']:.2%})") for name, c in changed]
    table(("tensor", "difference"), rows[:SHOWN])
    _more(len(rows), "differences")
    print(
        f"{found['changed_elements']:,} of {found['compared_elements']:,} elements changed "
        f"({found['changed_share']:.2%}) in {len(changed):,} of {found['compared_tensors']:,} tensors"
    )
