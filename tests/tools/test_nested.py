"""Nested state dicts, taken apart and put together again: exact, or refused with the path."""

import json
import math
import struct
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reload_plugin import flatten, unflatten
from reload_plugin.errors import SourceError

# --- equality that looks at everything ---


def assert_same(one: object, other: object, path: tuple = ()) -> None:
    """Types, order of keys, and bits; NaN equals the same NaN."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert [*map(bits, one)] == [*map(bits, other)], path
        assert [type(key) for key in one] == [type(key) for key in other], path
        for left, right in zip(one.items(), other.items(), strict=True):
            assert_same(left[1], right[1], (*path, left[0]))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, (*path, index))
    else:
        assert bits(one) == bits(other), path


def bits(value: object) -> object:
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg().contiguous()
        plain = plain.as_strided((plain.numel(),), (1,))
        return value.dtype, tuple(value.shape), value.requires_grad, bytes(plain.view(torch.uint8).tolist())
    if isinstance(value, float):
        return struct.pack(">d", value)
    if isinstance(value, complex):
        return struct.pack(">dd", value.real, value.imag)
    if isinstance(value, tuple):
        return tuple(map(bits, value))
    return type(value), value


def there_and_back(nested: object, work: Path | None = None) -> object:
    """Through JSON text; where there is a folder, through a file that the safetensors library writes."""
    flat, structure = flatten(nested)
    structure = json.loads(json.dumps(structure))
    if work is not None:
        save_file(flat, work / "flat.safetensors", {"structure": json.dumps(structure)})
        flat = load_file(work / "flat.safetensors")
    return unflatten(flat, structure)


# --- properties ---

TEXT = st.text(st.characters(codec=None), max_size=5) | st.sampled_from(
    [
        "",
        ".",
        "a.b",
        "a/b",
        "a",
        "b",
        "0",
        "1",
        "~2",
        "a~2",
        "__metadata__",
        "ä😀",
        "\ud83d\ude00",
        "\ud800",
        "\0",
    ]
)
NUMBERS = (
    st.integers() | st.integers(-(1 << 200), 1 << 200) | st.floats() | st.complex_numbers() | st.booleans()
)
KEYS = st.none() | TEXT | st.integers(-3, 3) | NUMBERS | st.tuples(TEXT, st.integers())
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.uint16,
]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits, which is what has to come back whatever they mean."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


@st.composite
def tensors(draw: Callable) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    tensor = filled(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    if tensor.ndim == 2 and draw(st.booleans()):
        tensor = tensor.t()
    if tensor.ndim and tensor.shape[0] > 1 and draw(st.booleans()):
        tensor = tensor[::2]
    if tensor.is_complex() and draw(st.booleans()):
        tensor = tensor.conj()
    if tensor.is_floating_point() and tensor.element_size() > 1 and draw(st.booleans()):
        tensor = torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
    return tensor


def containers(inner: st.SearchStrategy) -> st.SearchStrategy:
    items = st.lists(inner, max_size=4)
    entries = st.dictionaries(KEYS, inner, max_size=4)
    return items | items.map(tuple) | entries | entries.map(OrderedDict)


NESTED = st.recursive(st.none() | NUMBERS | TEXT | tensors(), containers, max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(NESTED)
def test_whatever_is_nested_comes_back_exactly(nested: object) -> None:
    assert_same(nested, there_and_back(nested))


@settings(max_examples=50, deadline=None)
@given(NESTED)
def test_the_table_is_what_the_safetensors_library_takes(tmp_path_factory, nested: object) -> None:
    assert_same(nested, there_and_back(nested, tmp_path_factory.mktemp("flat")))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_tensors_that_shared_memory_share_it_again(data: st.DataObject) -> None:
    """Views of one memory, anywhere in it: what is written through one shows in all that overlap it."""
    base = torch.arange(24, dtype=torch.float32)
    leaves = []
    for _ in range(data.draw(st.integers(2, 5))):
        start = data.draw(st.integers(0, 20))
        step = data.draw(st.integers(1, 3))
        leaves.append(base[start::step][: data.draw(st.integers(1, 6))])
    leaves.append(leaves[0])
    before = [leaf.clone() for leaf in leaves]
    flat, structure = flatten({"leaves": leaves})
    copies = {name: tensor.clone() for name, tensor in flat.items()}
    back = unflatten(copies, json.loads(json.dumps(structure)))["leaves"]
    assert_same(before, [leaf.clone() for leaf in back])
    assert back[0] is back[-1]
    position = data.draw(st.integers(0, len(leaves) - 1))
    with torch.no_grad():
        leaves[position].fill_(-1)
        back[position].fill_(-1)
    assert_same([leaf.clone() for leaf in leaves], [leaf.clone() for leaf in back])


# --- examples ---


def test_names_are_paths_with_dots() -> None:
    flat, _ = flatten(
        {"model": {"layers.0.weight": torch.ones(1), "list": [torch.zeros(1)]}, 3: torch.ones(2)}
    )
    assert list(flat) == ["model.layers.0.weight", "model.list.0", "3"]


def test_a_flat_state_dict_keeps_its_names() -> None:
    state = {"a.b": torch.ones(2), "c": torch.zeros(1)}
    assert list(flatten(state)[0]) == ["a.b", "c"]


def test_paths_that_collide_get_names_of_their_own() -> None:
    nested = {
        "a": {"b": torch.tensor(1), "b~2": torch.tensor(2)},
        "a.b": torch.tensor(3),
        "a.b~2": torch.tensor(4),
    }
    nested |= {1: torch.tensor(5), "1": torch.tensor(6), "__metadata__": torch.tensor(7)}
    flat, _ = flatten(nested)
    assert len(flat) == 7
    assert "__metadata__" not in flat
    assert_same(nested, there_and_back(nested))


def test_disjoint_parts_of_one_memory_are_stored_apart() -> None:
    """As FSDP's flat parameter has them: each under its own name and no larger than it is."""
    one, other = torch.arange(6.0).split(3)
    flat, _ = flatten({"one": one, "other": other})
    assert {name: tensor.shape for name, tensor in flat.items()} == {"one": (3,), "other": (3,)}


def test_a_tied_weight_is_stored_once() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    flat, structure = flatten({"embed": weight, "head": weight, "head_t": weight.detach().t()})
    assert list(flat) == ["embed"]
    back = unflatten(flat, structure)
    assert back["embed"] is back["head"]
    assert torch.equal(back["head_t"], weight.t())
    assert back["head_t"].data_ptr() == back["embed"].data_ptr() == weight.data_ptr()


def test_contiguous_tensors_are_not_copied() -> None:
    tensor = torch.randn(4)
    flat, structure = flatten([tensor])
    assert flat["0"].data_ptr() == tensor.data_ptr() == unflatten(flat, structure)[0].data_ptr()


def test_an_ordered_dict_keeps_the_versions_of_its_modules() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    back = there_and_back({"model": state})["model"]
    assert back._metadata == state._metadata
    assert back._metadata[""] == {"version": 2}


def test_an_ordered_dict_keeps_the_order_it_was_given_later() -> None:
    moved = OrderedDict(a=1, b=2)
    moved.move_to_end("a")
    assert_same(moved, there_and_back(moved))


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (lambda: 0, "function"),
        (Point(1, 2), "Point"),
        (np.float32(1), "numpy.float32"),
        (np.zeros(2), "numpy.ndarray"),
        (torch.zeros(2, device="meta"), "meta tensor"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.float32, "torch.dtype"),
        (torch.Size([1]), "torch.Size"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored_is_named_by_its_path(value: object, kind: str) -> None:
    with pytest.raises(SourceError) as caught:
        flatten({"model": [{"w": torch.zeros(1)}, {"x.y": value}], "other": ({3: value},)})
    text = str(caught.value)
    assert "['model'][1]['x.y']" in text
    assert "['other'][0][3]" in text
    assert kind in text
    assert text.endswith("Take it out, or turn it into tensors, numbers, strings, lists, tuples or dicts.")


def test_keys_that_cannot_be_stored_and_structures_that_hold_themselves() -> None:
    with pytest.raises(SourceError, match=r"\['a'\] has a key that is of the type frozenset"):
        flatten({"a": {frozenset(): 1}})
    loop: list = [1]
    loop.append({"again": loop})
    with pytest.raises(SourceError, match=r"\[1\]\['again'\] holds itself"):
        flatten(loop)
    deep: object = None
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SourceError, match="nested too deeply"):
        flatten(deep)


DAMAGED = [
    None,
    {},
    {"format": "other", "tree": None},
    {"tree": {"unknown": 1}},
    {"tree": {"int": "zz"}},
    {"tree": {"float": "00"}},
    {"tree": {"tuple": 3}},
    {"tree": {"dict": [[{"dict": []}, 1]]}},
    {"tree": {"dict": [1]}},
    {"tree": {"tensor": "missing"}},
    {"tree": {"tensor": ["x"]}},
    {"tree": {"tensor": "x", "view": {}}},
    {"tree": {"tensor": "x", "view": {"dtype": "nn", "shape": [1], "stride": [1], "offset": 0}}},
    {"tree": {"tensor": "x", "view": {"dtype": "int64", "shape": [2], "stride": [1], "offset": 0}}},
    {"tree": {"tensor": "x", "view": {"dtype": "uint8", "shape": [2], "stride": [1], "offset": -1}}},
    {"tree": {"tensor": "x", "view": {"dtype": "uint8", "shape": [2], "stride": [9], "offset": 0}}},
    {"tree": {"tensor": "x", "view": {"dtype": "uint8", "shape": [-2], "stride": [1], "offset": 0}}},
    {"tree": {"a": 1, "b": 2}},
]


@pytest.mark.parametrize("structure", DAMAGED, ids=repr)
def test_a_damaged_structure_is_refused(structure: object) -> None:
    if isinstance(structure, dict) and structure.keys() == {"tree"}:
        structure = {"format": "reload_plugin.nested/1", **structure}
    with pytest.raises(SourceError, match=r"Flatten it again|Give all tensors"):
        unflatten({"x": torch.zeros(8, dtype=torch.uint8)}, structure)
