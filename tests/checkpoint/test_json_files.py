"""An object read item by item is the one that is read as a whole, and takes little more than its text."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reload_plugin.checkpoint.formats import safetensors_files
from reload_plugin.checkpoint.io.json_files import strict_items, strict_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
spaces = st.text(" \t\n\r", max_size=3)


@given(
    st.dictionaries(st.text(), values, max_size=4), spaces, st.sampled_from([None, 1]), st.integers(0, 200)
)
def test_items_are_the_object(found: dict, space: str, indent: int | None, end: int) -> None:
    text = (space + json.dumps(found, indent=indent) + space).encode()
    try:
        whole = strict_json(text)
    except ValueError:  # half a surrogate pair
        with pytest.raises(ValueError, match="surrogates"):
            list(strict_items(text))
        return
    assert list(strict_items(text)) == list(whole.items())
    cut = text[:end]
    try:
        whole = strict_json(cut)
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            list(strict_items(cut))
    else:
        assert dict(strict_items(cut)) == whole


@pytest.mark.parametrize(
    "text", [b'{"a": 1}x', b'{"a": 1,}', b'{"a" 1}', b'{"a": NaN}', b"{1: 1}", b"[]", b""]
)
def test_what_is_no_object_is_refused_either_way(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(strict_items(text))
    if text != b"[]":
        with pytest.raises(ValueError, match=r"."):
            strict_json(text)


def test_a_large_header_is_never_in_memory_as_objects(tmp_path: Path) -> None:
    names = [f"model.layers.{n // 500}.mlp.experts.{n % 500}.gate_proj.weight" for n in range(20_000)]
    entry = {"dtype": "BF16", "shape": [8, 128]}
    header = {name: entry | {"data_offsets": [2048 * n, 2048 * n + 2048]} for n, name in enumerate(names)}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.truncate(8 + len(text) + 2048 * len(names))
    del header
    tracemalloc.start()
    layout = safetensors_files.read_header(str(tmp_path / "model.safetensors")).layout
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [info.name for info in layout.infos] == names
    assert layout.infos[-1].dtype is torch.bfloat16
    assert peak - kept < 4 * len(text), f"{peak - kept:,} bytes beside the {kept:,} of what a header says"
